"""Batches of shards."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from calib_guidance.data import SampleRequests
from calib_guidance.data.requests import RequestData, ShardLoader
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import RunFolder
from calib_guidance.runs.context import SamplingContext
from calib_guidance.runs.store import cut
from tests.test_run_folder import table


class Numbers(RequestData):
    """Requests whose third cannot be read."""

    def __init__(self, count, batch_size, num_workers):
        super().__init__()
        self.requests = [{"index": i, "seed": 7} if i != 3 else {"corrupt": ["three.png"]} for i in range(count)]
        self.batch_size, self.num_workers = batch_size, num_workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_cut_within_shards_and_carry_their_shard(tmp_path, num_workers):
    run, context = RunFolder(tmp_path, 4, 11), SamplingContext()
    run.begin({}, {})
    run.claims.acquire(range(0, 4))
    run.write(range(0, 4), table(range(0, 4)))
    context.store, context.shards = run, run.remaining()
    data = Numbers(11, 3, num_workers)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(context=context))
    loader = data.predict_dataloader()
    found = [(batch["shard"], batch["index"].tolist()) for batch in loader]
    assert [(part.shard, part.rows, part.is_last, part.num_left, indices) for part, indices in found] == [
        (range(4, 8), range(4, 7), False, 4, [4, 5, 6]),
        (range(4, 8), range(7, 8), True, 1, [7]),
        (range(8, 11), range(8, 11), True, 3, [8, 9, 10]),
    ]
    assert len(loader) == 3
    assert run.claims.holds(range(4, 8))
    assert not run.claims.holds(range(0, 4))


def test_lightning_moves_a_batch_and_leaves_its_shard():
    (batch,) = SampleRequests(3, num_classes=3, batch_size=3).predict_dataloader()
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved["shard"] is batch["shard"]
    assert moved["index"].device.type == "meta"


def test_what_cannot_be_read_is_named():
    first = next(iter(Numbers(11, 4, 0).predict_dataloader()))
    assert first["index"].tolist() == [0, 1, 2]
    assert first["corrupt"] == ["three.png"]


def test_shards_that_others_left_come_last():
    class Others(SamplingContext):
        def reclaim(self):
            yield range(6, 9)

    requests = [{"index": i} for i in range(9)]
    loader = ShardLoader(requests, 2, Others([range(0, 3)]))
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2], [6, 7], [8]]


def test_cut():
    assert cut(range(5, 12), 3) == [range(5, 8), range(8, 11), range(11, 12)]
    assert cut(range(0), 3) == []


def test_without_a_folder_all_are_taken_in_order():
    data = SampleRequests(5, num_classes=3, batch_size=2)
    assert torch.cat([batch["label"] for batch in data.predict_dataloader()]).tolist() == [0, 1, 2, 0, 1]


def test_a_shard_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"data.shard_size must be at least 1, got 0"):
        SampleRequests(5, shard_size=0)


class TestNumberOfClasses:
    def test_the_models_is_taken_where_none_is_stated(self):
        data = SampleRequests(5)
        data.take_num_classes(3)
        assert [data[i]["label"] for i in range(5)] == [0, 1, 2, 0, 1]
        data = SampleRequests(5, num_classes=2)
        data.take_num_classes(3)  # the task refuses the contradiction
        assert data.num_classes == 2

    def test_labels_are_checked_when_it_is_known(self):
        data = SampleRequests(2, labels=3)
        with pytest.raises(ConfigurationError, match="class"):
            data.take_num_classes(3)
        data = SampleRequests(2, labels=3)
        data.take_num_classes(4)
        assert data[1]["label"] == 3

    def test_without_any_it_must_be_stated(self):
        with pytest.raises(
            ConfigurationError, match="data.num_classes: neither the denoiser nor a classifier has classes"
        ):
            SampleRequests(2).take_num_classes(None)
