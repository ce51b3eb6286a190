"""Samples are written beside the next batch, and nothing of that shows in what is written."""

import os
import signal
import threading
import time

import lightning as L
import pytest
import torch
import yaml

from calib_guidance.callbacks import sample_writer
from calib_guidance.callbacks.sample_writer import Background, to_host
from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning
from calib_guidance.errors import RunError, StoppedError
from calib_guidance.runs import RunFolder


class TestBackground:
    def test_jobs_keep_their_order_and_so_many_wait(self):
        background, done, ahead = Background(2), [], []

        def job(number):
            time.sleep(0.002)
            done.append(number)

        for number in range(20):
            background.give(lambda number=number: job(number))
            ahead.append(number + 1 - len(done))
        background.finish()
        assert done == list(range(20))
        assert max(ahead) <= 2
        background.close()

    def test_what_fails_is_raised_and_what_follows_is_skipped(self):
        background, go, done = Background(2), threading.Event(), []

        def fail():
            go.wait(60)
            raise StoppedError("full")

        background.give(fail)
        background.give(lambda: done.append(1))
        go.set()
        with pytest.raises(StoppedError, match="full"):
            background.finish()
        with pytest.raises(StoppedError, match="full"):
            background.give(lambda: done.append(2))
        background.close()
        assert done == []

    def test_closing_waits(self):
        background, done = Background(2), []
        background.give(lambda: (time.sleep(0.01), done.append(1)))
        background.close()
        assert done == [1]

    @pytest.mark.parametrize("started", [0, 1, 2])
    def test_a_thread_that_cannot_start_is_said_before_any_work(self, monkeypatch, started):
        """Nobody waits for a pool with some threads running and others that could not be started."""
        start, starts = threading.Thread.start, iter(range(99))

        def refuse(thread):
            if next(starts) >= started:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(sample_writer, "available_cores", lambda: 4)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RunError, match="no thread could be started .*ulimit -u"):
            Background(2)

    def test_tensors_on_the_host_stay_where_they_are(self):
        tensors = {"a": torch.arange(3), "b": torch.ones(2, 2)}
        found = to_host(tensors)()
        assert {name: t.data_ptr() for name, t in found.items()} == {n: t.data_ptr() for n, t in tensors.items()}


class _Prepared(CalibGuidanceCLI):
    """All parts made, and nothing run."""

    def _run_subcommand(self, subcommand):
        pass


class Hooks(L.Callback):
    """Calls functions at the beginning of batches, ``{number: function}``."""

    def __init__(self, functions):
        self.functions = functions

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.functions.get(batch_idx, lambda: None)()


@pytest.fixture
def sample(in_root, tmp_path, monkeypatch):
    """Samples 30 digits in shards of one batch of 10, and calls functions at the beginning of batches."""

    def run(functions=None, before_sync=None, samples=30):
        callbacks = [{"class_path": "calib_guidance.callbacks.SampleWriter"}]
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        cli = run_lightning(
            [
                "predict",
                "--config=lightning_configs/predict/digits.yaml",
                f"--config={path}",
                f"--trainer.default_root_dir={tmp_path / 'run'}",
                f"--data.init_args.num_samples={samples}",
                "--data.init_args.batch_size=10",
                "--model.init_args.guidance=null",
                "--model.init_args.sampler.init_args.steps=2",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
            ],
            _Prepared,
        )
        cli.trainer.callbacks.insert(0, Hooks(functions or {}))
        if before_sync is not None:
            sync = os.fsync

            def waiting(handle):
                before_sync(os.readlink(f"/proc/self/fd/{handle}"))
                sync(handle)

            monkeypatch.setattr(os, "fsync", waiting)
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)

    return run


def records(folder):
    return sorted(path.stem for path in (folder / "run/shards").glob("*.json"))


def test_a_shard_is_written_while_the_next_batch_is_made(sample, tmp_path):
    """The first waits for the second batch to begin, which would never be where one waits for the other."""
    begun, waited = threading.Event(), []

    def before_sync(name):
        if "00000000.parquet" in name:
            waited.append(begun.wait(60))

    sample({1: begun.set}, before_sync)
    assert waited == [True]
    assert records(tmp_path) == ["00000000", "00000010", "00000020"]
    assert not list((tmp_path / "run/claims").iterdir())


def test_a_signal_between_two_shards_leaves_what_is_being_written_complete(sample, tmp_path):
    noted = threading.Event()

    def stop():
        noted.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def before_sync(name):
        if "00000000.parquet" in name:
            assert noted.wait(60)

    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        sample({1: stop}, before_sync)
    assert records(tmp_path) == ["00000000"]
    assert RunFolder.open(tmp_path / "run").remaining(verify=True) == [range(10, 20), range(20, 30)]
    assert not list((tmp_path / "run/claims").iterdir())
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_write_that_fails_as_the_last_is_not_passed_over(sample, tmp_path):
    def before_sync(name):
        if "00000020.parquet" in name:
            raise PermissionError("not any more")

    with pytest.raises(StoppedError, match=r"not any more. 2 complete shards are kept"):
        sample(before_sync=before_sync)
    assert records(tmp_path) == ["00000000", "00000010"]
    assert not list((tmp_path / "run/claims").iterdir())


def test_a_shard_that_is_reclaimed_before_it_is_written_is_the_others(sample, tmp_path, caplog):
    begun = threading.Event()

    def reclaim():
        claim = tmp_path / "run/claims/00000010"
        claim.write_text(claim.read_text().replace('"worker": "', '"worker": "x'))

    def before_sync(name):
        if "00000000.parquet" in name:
            assert begun.wait(60)

    sample({1: reclaim, 2: begun.set}, before_sync)
    assert "samples 10 … 19 were reclaimed by another worker" in caplog.text
    assert records(tmp_path) == ["00000000", "00000020"]
