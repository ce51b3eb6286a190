"""All metrics of a classifier at once, in one process and in two."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from calib_guidance.metrics import Accuracy, ClassifierMetrics, ReliabilityBins
from tests import processes

NAMES = {
    "accuracy",
    "nll",
    "brier",
    "ece",
    "adaptive_ece",
    "maximum_ece",
    "classwise_ece",
    "smooth_ece",
    "signed_ece",
    "overconfidence",
    "aurc",
    "excess_aurc",
    "bins",
}


def batches(n=700, classes=7, levels=3):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, generator=generator)
    y = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    level = torch.randint(levels, (n,), generator=generator)
    return list(zip(logits.split(100), y.split(100), level.split(100), strict=True))


def measure(metrics, rows):
    for batch in rows:
        metrics.update(*batch)
    return metrics.compute()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, levels in expected.items():
        torch.testing.assert_close(
            tuple(found[name]),
            tuple(levels),
            atol=1e-6,
            rtol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_names():
    assert measure(ClassifierMetrics(7, 3), batches()).keys() == NAMES | {"top5_accuracy"}
    assert measure(ClassifierMetrics(5, 3), batches(classes=5)).keys() == NAMES


def test_each_is_the_metric_alone():
    found = measure(ClassifierMetrics(7, 3), batches())
    for name, alone in {
        "accuracy": Accuracy(num_levels=3),
        "top5_accuracy": Accuracy(5, 3),
        "bins": ReliabilityBins(num_levels=3),
    }.items():
        assert_same({name: found[name]}, {name: measure(alone, batches())})


def test_metrics_that_agree_on_the_first_batch_stay_apart():
    """As top-1 and top-5 accuracy do where all are right."""
    metrics = ClassifierMetrics(10)
    metrics.update(torch.eye(10), torch.arange(10))
    metrics.update(torch.eye(10) - torch.arange(10) / 100, (torch.arange(10) + 1) % 10)
    found = metrics.compute()
    assert float(found["accuracy"].overall) == 0.5
    assert float(found["top5_accuracy"].overall) > 0.6


def test_starts_again_after_reset():
    metrics = ClassifierMetrics(7, 3)
    expected = measure(metrics, batches())
    metrics.reset()
    assert all(levels.overall.isnan() for name, levels in metrics.compute().items() if name != "bins")
    assert float(metrics.compute()["bins"].overall.sum()) == 0
    assert_same(measure(metrics, batches()), expected)


def test_counting_continues_after_compute():
    metrics, rows = ClassifierMetrics(7, 3), batches()
    expected = measure(ClassifierMetrics(7, 3), rows)
    measure(metrics, rows[:3])
    assert_same(measure(metrics, rows[3:]), expected)
    logits, y, _ = (torch.cat(parts) for parts in zip(*rows, strict=True))
    torch.testing.assert_close(metrics.compute()["bins"].overall, ReliabilityBins().of(logits, y))


def test_leaves_inference_mode():
    """Validation may run under it and what follows not."""
    metrics, rows = ClassifierMetrics(7, 3), batches()
    expected = measure(ClassifierMetrics(7, 3), rows)
    with torch.inference_mode():
        metrics.reset()
        for batch in rows[:3]:
            metrics.update(*batch)
    assert_same(measure(metrics, rows[3:]), expected)


def test_copies_and_pickles():
    metrics, rows = ClassifierMetrics(7, 3), batches()
    expected = measure(ClassifierMetrics(7, 3), rows)
    measure(metrics, rows[:3])
    for again in (copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert_same(measure(again, rows[3:]), expected)


def test_states_have_a_fixed_size():
    metrics = ClassifierMetrics(7, 3)
    before = {name: metric.sums.shape for name, metric in metrics.items()}
    measure(metrics, batches())
    assert {name: metric.sums.shape for name, metric in metrics.items()} == before


def measure_on_rank(rank, folder):
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows, found = batches(), {}
    metrics = ClassifierMetrics(7, 3)
    found["uneven"] = measure(metrics, rows[:5] if rank == 0 else rows[5:6])
    found["continued"] = measure(metrics, rows[6:] if rank == 1 else [])
    metrics.reset()
    found["empty rank"] = measure(metrics, rows if rank == 0 else [])
    metrics.reset()
    found["no data"] = measure(metrics, [])
    torch.save({name: {k: tuple(v) for k, v in values.items()} for name, values in found.items()}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    processes.succeed(tmp_path, ranks=2, function="tests.metrics.test_classifier_metrics:measure_on_rank")
    rows = batches()
    expected = {
        "uneven": measure(ClassifierMetrics(7, 3), rows[:6]),
        "continued": measure(ClassifierMetrics(7, 3), rows),
        "empty rank": measure(ClassifierMetrics(7, 3), rows),
        "no data": measure(ClassifierMetrics(7, 3), []),
    }
    for rank in "01":
        found = torch.load(tmp_path / rank)
        for name, values in expected.items():
            assert_same(found[name], values)
