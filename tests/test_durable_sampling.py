"""Sampling runs that are stopped, killed, moved, shared and extended end with what one uninterrupted run makes."""

import json
import os
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import yaml

from calib_guidance.callbacks.clean_stop import restored_signals
from calib_guidance.cli import main
from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning
from calib_guidance.runs import RunFolder
from calib_guidance.weights.io import read_weights, save_weights
from tests.conftest import ROOT
from tests.runs import QUICK, flip, metrics, metrics_without_time, samples_of, tables

CONFIG = "lightning_configs/predict/digits.yaml"
UNDRAWN = yaml.safe_load((ROOT / CONFIG).read_text())["trainer"]["callbacks"]
UNDRAWN[-1]["init_args"] = {"plots": False}
TAIL = 45
FORK = get_context("fork")


def words(folder, *more, samples=TAIL, batch=10, steps=3):
    return [
        "predict",
        f"--config={CONFIG}",
        f"--config={yaml.safe_dump({'trainer': {'callbacks': UNDRAWN}})}",
        *(word for word in more if word.startswith("--config=")),
        f"--trainer.default_root_dir={folder}",
        f"--data.init_args.num_samples={samples}",
        f"--data.init_args.batch_size={batch}",
        f"--model.init_args.sampler.init_args.steps={steps}",
        *QUICK,
        *(word for word in more if not word.startswith("--config=")),
    ]


def predict(folder, *more, **numbers):
    main(words(folder, *more, **numbers))


def stop(folder, *more, after, **numbers):
    """A run that fails after some batches."""
    callback = {"class_path": "tests.interruptions.StopAfter", "init_args": {"batches": after}}
    with pytest.raises(KeyError, match="stopped by the test"):
        predict(folder, *more, f"--trainer.callbacks+={json.dumps(callback)}", **numbers)
    assert not list((Path(folder) / "claims").iterdir())
    assert not (Path(folder) / "metrics.json").exists()


def makers(folder):
    """Who made each shard."""
    run = RunFolder.open(folder)
    return {shard.start: run.record(shard)["worker"] for shard in run.shards()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """An uninterrupted run of 45 samples, in shards of 10; others begin from copies of it."""
    folder, before = tmp_path_factory.mktemp("complete"), os.getcwd()
    os.chdir(ROOT)
    try:
        predict(folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copy(complete, tmp_path, in_root):
    return Path(shutil.copytree(complete, tmp_path / "run"))


def test_three_pieces_are_one_run(in_root, tmp_path, complete):
    """The bytes of all files of samples, and every metric to the last digit."""
    stop(tmp_path, after=2)
    assert list(tables(tmp_path)) == ["00000000.parquet", "00000010.parquet"]
    stop(tmp_path, after=1)
    predict(tmp_path)
    assert len(set(makers(tmp_path).values())) == 3
    assert tables(tmp_path) == tables(complete)
    assert metrics_without_time(tmp_path) == metrics_without_time(complete)
    assert metrics_without_time(complete)["num_samples"] == TAIL
    assert {"fd", "classifier_accuracy", "integral_ece", "gradient_norm_t"} <= metrics_without_time(complete).keys()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_going_on_with_another_batch_size(copy, complete, batch):
    for name in ("00000010", "00000040"):
        (copy / "shards" / f"{name}.json").unlink()
    predict(copy, batch=batch)
    found, expected = samples_of(copy), samples_of(complete)
    for key in ("index", "label", "seed"):
        assert torch.equal(found[key], expected[key])
    assert found["index"].tolist() == list(range(TAIL))
    difference = (found["image"].int() - expected["image"].int()).abs()
    assert difference.max() <= 1  # float32 within 1e-4 is a level of 8 bits where it crosses its edge
    assert (difference > 0).float().mean() < 0.01


def test_nothing_left_reports_the_same(copy, complete, capsys):
    predict(copy, batch=7)
    assert (copy / "metrics.json").read_text() == (complete / "metrics.json").read_text()
    assert f"{TAIL} samples, 3 NFE each" in capsys.readouterr().out
    assert makers(copy) == makers(complete)


def test_more_samples_extend_it(copy, complete, tmp_path):
    predict(copy, samples=57)
    predict(tmp_path / "once", samples=57)
    assert tables(copy) == tables(tmp_path / "once")
    assert metrics_without_time(copy) == metrics_without_time(tmp_path / "once")
    kept = [first for first, worker in makers(copy).items() if worker == makers(complete).get(first)]
    assert kept == [0, 10, 20, 30]  # the tail of 5 is regenerated as a shard of 10


def test_fewer_samples_take_nothing_away(copy, complete, caplog):
    predict(copy, samples=10)
    assert f"holds {TAIL - 10} samples beyond those requested: kept, and not counted" in caplog.text
    assert tables(copy) == tables(complete)
    assert metrics(copy)["num_samples"] == 10
    (copy / "shards/00000040.json").unlink()
    predict(copy, samples=10)
    assert metrics(copy)["num_samples"] == 10


class TestIdentity:
    @pytest.fixture
    def refused(self, copy, capsys):
        def run(*more, **numbers):
            before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
            with pytest.raises(SystemExit) as end:
                predict(copy, *more, **numbers)
            assert end.value.code == 2
            assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
            return capsys.readouterr().err

        return run

    def test_another_is_refused_by_key(self, refused):
        message = refused("--model.init_args.guidance.init_args.scale=2", "--data.init_args.seed=5", steps=4)
        assert "model.init_args.sampler.init_args.steps: 3 in the folder, now 4" in message
        assert "model.init_args.guidance.init_args.scale: 1.0 in the folder, now 2.0" in message
        assert "data.init_args.seed: 0 in the folder, now 5" in message
        assert message.count("in the folder, now") == 3
        assert "shard_size: 10 in the folder, now 5" in refused("--data.init_args.shard_size=5")
        assert "trainer.precision: 32-true in the folder, now bf16-mixed" in refused("--trainer.precision=bf16-mixed")
        assert "data.init_args.labels: balanced in the folder, now 7" in refused("--data.init_args.labels=7")

    def test_weights_count_by_what_is_in_them(self, refused, copy, tmp_path):
        option = "--model.init_args.guidance.init_args.classifier.init_args.weights"
        moved = tmp_path / "elsewhere.safetensors"
        shutil.copy("checkpoints/digits/classifier.safetensors", moved)
        predict(copy, f"{option}={moved}")
        state = read_weights(moved).state
        state["fc.bias"][0] += 1e-3
        save_weights(state, moved)
        assert "weights of guidance: " in refused(f"{option}={moved}")

    def test_label_files_count_by_what_is_in_them(self, in_root, tmp_path, capsys):
        for name, label in (("a", 1), ("b", 1), ("c", 2)):
            (tmp_path / name).write_text(f"{label}\n" * 10)
        run = tmp_path / "run"
        predict(run, f"--data.init_args.labels={tmp_path / 'a'}", samples=10)
        predict(run, f"--data.init_args.labels={tmp_path / 'b'}", samples=10)
        with pytest.raises(SystemExit):
            predict(run, f"--data.init_args.labels={tmp_path / 'c'}", samples=10)
        assert "data.init_args.labels: sha256 of the file" in capsys.readouterr().err

    def test_a_restart_removes_it(self, copy, tmp_path):
        callbacks = yaml.safe_load(Path(CONFIG).read_text())["trainer"]["callbacks"]
        callbacks[0]["init_args"] = {"restart": True}
        (tmp_path / "restart.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        predict(copy, f"--config={tmp_path / 'restart.yaml'}", samples=10, steps=4)
        assert list(tables(copy)) == ["00000000.parquet"]
        assert metrics_without_time(copy)["nfe"] == 4


class TestDamage:
    def test_only_corrupted_shards_are_regenerated(self, copy, complete, caplog):
        flip(copy / "samples/00000010.parquet")
        os.truncate(copy / "samples/00000020.parquet", 100)
        (copy / "samples/00000030.parquet").unlink()
        (copy / "samples/mine.parquet").write_text("?")
        predict(copy)
        (copy / "samples/mine.parquet").unlink()
        assert tables(copy) == tables(complete)
        assert metrics_without_time(copy) == metrics_without_time(complete)
        new, old = makers(copy), makers(complete)
        assert [first for first in new if new[first] == old[first]] == [0, 40]
        for said in (
            "samples 10 … 19 are regenerated: 00000010.parquet is not what was written",
            "00000020.parquet has 100 bytes",
            "00000030.parquet is missing",
            "1 files belong to no shard, and are not counted: samples/mine.parquet",
        ):
            assert said in caplog.text

    def test_a_measurement_that_saw_only_a_part_is_not_reported(self, copy, caplog, tmp_path):
        (copy / "shards/00000010.json").unlink()
        callbacks = yaml.safe_load(Path(CONFIG).read_text())["trainer"]["callbacks"]
        calibration = next(c for c in callbacks if c["class_path"].endswith("TrajectoryCalibration"))
        calibration["init_args"] = {"num_bins": 10}
        (tmp_path / "bins.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        predict(copy, f"--config={tmp_path / 'bins.yaml'}")
        assert "TrajectoryCalibration is not in the report" in caplog.text
        assert "integral_ece" not in metrics_without_time(copy)
        assert "gradient_norm_t" in metrics_without_time(copy)


class _Prepared(CalibGuidanceCLI):
    """All parts made, and nothing run."""

    def _run_subcommand(self, subcommand):
        pass


class Workers:
    """Processes that sample in one folder, each started in milliseconds: forked off when all parts are made."""

    def __init__(self, folder, samples, denoiser=None):
        callbacks = [{"class_path": "calib_guidance.callbacks.SampleWriter", "init_args": {}}]
        path = Path(folder).with_suffix(".yaml")
        model = {"guidance": None} | ({"denoiser": denoiser} if denoiser else {})
        path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}, "model": {"init_args": model}}))
        self.cli = run_lightning(words(folder, f"--config={path}", samples=samples, batch=4, steps=2), _Prepared)

    @restored_signals()
    def __call__(self):
        """In this process, which has imported all of it then."""
        self.cli.trainer.predict(self.cli.model, datamodule=self.cli.datamodule, return_predictions=False)

    def _run(self):
        # Hundreds of reports that the device is a CPU are of no use.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self()

    def start(self):
        process = FORK.Process(target=self._run)
        process.start()
        return process


def assert_complete(folder, samples):
    run = RunFolder.open(folder)
    assert run.remaining(verify=True) == run.foreign() == []
    assert samples_of(folder)["index"].tolist() == list(range(samples))
    assert not [path for path in Path(folder).rglob("*") if path.suffix == ".tmp"]
    assert not list((Path(folder) / "claims").iterdir())


def test_any_number_of_workers_at_any_time(in_root, tmp_path):
    """Two that know nothing of each other, one of them killed, then one alone, then three: the bytes of one."""
    Workers(tmp_path / "one", 240)()
    shared = Workers(tmp_path / "shared", 240)
    first = [shared.start(), shared.start()]
    shards = tmp_path / "shared/shards"
    for count, process in ((10, first[0]), (20, first[1])):
        while not shards.exists() or len(list(shards.glob("*.json"))) < count:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    alone = shared.start()
    while len(list(shards.glob("*.json"))) < 30:
        time.sleep(0.005)
    others = [shared.start(), shared.start()]
    for process in (alone, *others):
        process.join()
        assert process.exitcode == 0
    assert_complete(tmp_path / "shared", 240)
    assert tables(tmp_path / "shared") == tables(tmp_path / "one")
    assert len(set(makers(tmp_path / "shared").values())) >= 2


@pytest.mark.slow
def test_a_hundred_kills(in_root, tmp_path):
    """At random instants of one run of many shards; it ends with the bytes of one that nobody disturbed."""
    samples = 900
    # Two points in space, which are sampled in no time.
    mixture = {"means": [[-0.5, 0.0, 0.5], [0.5, 0.5, 0.0]], "covariances": [0.1, 0.2]}
    denoiser = {"class_path": "calib_guidance.denoisers.GaussianMixture", "init_args": mixture}
    one, killed = (Workers(tmp_path / name, samples, denoiser) for name in ("one", "killed"))
    one()

    folder = tmp_path / "killed/shards"

    def shards():
        return sum(name.endswith(".json") for name in os.listdir(folder)) if folder.exists() else 0

    draw = random.Random(0)
    for _ in range(100):
        process = killed.start()
        # While it begins, or after it has made a shard or two: whatever the speed of the machine, kills hit all that it does.
        before, more = shards(), draw.choice((0, 0, 1, 2))
        while shards() < before + more:
            time.sleep(0.003)
        end = time.monotonic() + draw.uniform(0, 0.01 if more else 0.1)
        while time.monotonic() < end and shards() <= before + more:
            time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 50 < shards() < samples // 4
    killed()
    assert_complete(tmp_path / "killed", samples)
    assert tables(tmp_path / "killed") == tables(tmp_path / "one")
