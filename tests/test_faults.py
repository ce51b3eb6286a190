"""Sampling through faults: numbers that are not finite, memory that does not suffice, disks that are full, signals."""

import errno
import json
import os
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from calib_guidance.callbacks import clean_stop
from calib_guidance.callbacks.clean_stop import SIGNALS, CleanStop, restored_signals
from calib_guidance.cli import lightning as cli
from calib_guidance.cli import main
from calib_guidance.errors import ConfigurationError, StoppedError
from calib_guidance.tasks import GuidedSampling
from calib_guidance.tasks.retry import in_float32, is_out_of_memory
from tests.conftest import ROOT
from tests.runs import QUICK, metrics, samples_of, tables

SAMPLES, BATCH, STEPS = 20, 10, 4
FAILING = 13  # the one sample of class 7


@pytest.fixture(autouse=True)
def _root(in_root):
    """Paths of the configuration lead from there."""


def configuration(folder, *, configured=None, fault=None, callbacks=(), writer=None, score=None, **data):
    """The digits configuration, small, with trajectory measurements and with a faulty denoiser where asked.

    The file and the labels are beside ``configured``, which is the folder of the samples otherwise.
    """
    config = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())
    kept = [c for c in config["trainer"]["callbacks"] if not c["class_path"].endswith(("Quality", "RunReport"))]
    report = {"class_path": "calib_guidance.callbacks.RunReport", "init_args": {"plots": False}}
    config["trainer"]["callbacks"] = [*kept, *callbacks, report]
    config["trainer"]["default_root_dir"] = str(folder)
    kept[0]["init_args"] = writer or {}
    init = config["model"]["init_args"]
    init["sampler"] = {"class_path": "DDPM", "init_args": {"steps": str(STEPS)}}
    if fault:
        init["denoiser"] = {"class_path": "tests.faulty.Faulty", "init_args": {"denoiser": init["denoiser"]} | fault}
    if score:
        init["guidance"]["init_args"]["score"] = score
    configured = configured or folder
    labels = configured.with_suffix(".labels")
    labels.write_text("\n".join("7" if i == FAILING else str(i % 7) for i in range(100)))
    config["data"]["init_args"] |= {"num_samples": SAMPLES, "batch_size": BATCH, "labels": str(labels)} | data
    path = configured.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def predict(folder, **settings):
    """Exit status of one run."""
    try:
        main(["predict", "--config", str(configuration(folder, **settings)), *QUICK])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert predict(folder) == 0
    return folder


def assert_same(folder, sound, but=()):
    """The same samples, up to a gray level where rounding of other batch sizes tips one."""
    found, expected = samples_of(folder), samples_of(sound)
    rows = [row for row in range(SAMPLES) if row not in but]
    assert found["index"].tolist() == rows
    assert torch.equal(found["label"], expected["label"][rows])
    assert (found["image"].int() - expected["image"][rows].int()).abs().max() <= 1


def claims(folder):
    return [path.name for path in (folder / "claims").iterdir()]


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "shards").glob("*.json"))}


TILTED = {
    "class_path": "calib_guidance.scores.Tilted",
    "init_args": {"tilt": -0.2, "group_size": 5, "score": {"class_path": "calib_guidance.scores.TemperedLogProb"}},
}


class TestNonFinite:
    def test_half_precision_that_overflows_is_mended_in_float32(self, sound, tmp_path, caplog):
        folder = tmp_path / "run"
        assert predict(folder, fault={"label": 7, "step": 333, "fault": "overflow"}) == 0
        assert "not finite, sampling again in float32: 13" in caplog.text
        assert_same(folder, sound)
        assert [record["failed"] for record in records(folder).values()] == [[], []]
        # The metrics are those of the samples as they are, each counted once at every step.
        found, expected = metrics(folder), metrics(sound)
        for name, column in (("gradient_norm_t", "mean"), ("gradient_norm_t", "std"), ("ece_t", "ece")):
            assert found[name][column] == pytest.approx(expected[name][column], rel=1e-5)

    @pytest.mark.parametrize("fault", ["nan", "inf"])
    def test_what_float32_does_not_mend_fails_and_is_named(self, sound, tmp_path, capsys, fault):
        """An infinite x̂0 does not pass for one that was clipped to ±1."""
        folder = tmp_path / "run"
        settings = {"fault": {"label": 7, "step": 333, "fault": fault}}
        assert predict(folder, **settings) == 3
        assert "13" in capsys.readouterr().err
        assert_same(folder, sound, but=[FAILING])
        first, second = records(folder).values()
        assert first["failed"] == []
        (failed,) = second["failed"]
        assert (failed["index"], failed["step"]) == (FAILING, 333)
        assert "not finite" in failed["reason"]
        assert failed["configuration"] == json.loads((folder / "run.json").read_text())["fingerprint"]
        assert second["rows"] == 9
        counted = metrics(folder)["gradient_norm_t"]
        assert all(value == value for value in counted["mean"] + counted["std"])  # not NaN
        # Nothing is left to do, and it still says so.
        before = tables(folder)
        assert predict(folder, **settings) == 3
        assert tables(folder) == before

    def test_a_tilting_group_is_made_again_together(self, tmp_path, caplog):
        """Its samples depend on each other: a step of one that is not finite is one of all."""
        complete, folder = tmp_path / "complete", tmp_path / "run"
        assert predict(complete, score=TILTED) == 0
        assert predict(folder, score=TILTED, fault={"label": 7, "step": 333, "fault": "overflow"}) == 0
        assert "not finite, sampling again in float32: 10, 11, 12, 13, 14" in caplog.text
        assert_same(folder, complete)

    def test_float32_leaves_no_trace(self):
        """Inside all is float32, whatever autocast says; afterwards numbers, formats and sharing are what they were."""
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).half()
        network[1].bfloat16()
        network[2].weight = network[0].weight
        network[0].dtype = torch.float16
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with torch.autocast("cpu", torch.bfloat16), in_float32(network):
            inside = {tensor.dtype for tensor in network.state_dict().values()}
            inside |= {network[0].dtype, network(torch.ones(1, 3)).dtype}
        assert inside == {torch.float32}
        after = network.state_dict()
        assert network[0].dtype == torch.float16
        assert network[2].weight is network[0].weight
        assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class TestMemory:
    def test_a_batch_that_does_not_fit_is_halved(self, sound, tmp_path, caplog):
        folder = tmp_path / "run"
        assert predict(folder, fault={"largest": 3, "step": 333}) == 0
        assert caplog.text.count("out of memory with 10 samples at a time on cpu: continuing with 3 at a time") == 1
        assert caplog.text.count("out of memory") == 1  # the second batch is cut beforehand
        assert_same(folder, sound)
        found, expected = metrics(folder), metrics(sound)  # steps that were tried in vain are not counted
        assert found["gradient_norm_t"]["std"] == pytest.approx(expected["gradient_norm_t"]["std"], rel=1e-4)
        assert found["ece_t"]["ece"] == pytest.approx(expected["ece_t"]["ece"], rel=1e-4)

    def test_groups_stay_complete(self, tmp_path, caplog, capsys):
        assert predict(tmp_path / "run", score=TILTED, fault={"largest": 9, "step": 333}) == 0
        assert "continuing with 5" in caplog.text
        assert predict(tmp_path / "none", score=TILTED, fault={"largest": 4, "step": 333}) == 1
        assert "one group of 5 samples, which the score tilts together, does not fit" in capsys.readouterr().err
        assert claims(tmp_path / "none") == []

    def test_who_says_so(self):
        with pytest.raises(RuntimeError) as allocator:
            torch.empty(1 << 60, dtype=torch.uint8)
        assert is_out_of_memory(allocator.value)
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        assert is_out_of_memory(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        )
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        assert not is_out_of_memory(ValueError("out of memory"))


def interrupted(batches, **settings):
    """A run in shards of two batches, with a signal in the middle of some of them."""
    callback = {"class_path": "tests.faulty.SignalAt", "init_args": {"batches": batches}}
    return {"callbacks": [callback], "batch_size": 5, "shard_size": 10} | settings


class TestSignals:
    @pytest.fixture(autouse=True)
    def heeded(self):
        """A test run that nohup started ignores SIGHUP, and a command then ignores it too."""
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGHUP, before)

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
    def test_the_current_shard_is_finished(self, sound, tmp_path, capsys, name):
        folder = tmp_path / "run"
        handlers = [signal.getsignal(number) for number in SIGNALS]
        assert predict(folder, **interrupted({0: name})) == 4
        message = capsys.readouterr().err
        assert f"stopped by {name}, the current shard was finished" in message
        assert f"calib-guidance status {folder}" in message
        assert list(records(folder)) == ["00000000"]
        assert claims(folder) == []
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert predict(folder, **interrupted({})) == 0
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert_same(folder, sound)

    def test_what_is_ignored_stays_ignored(self):
        """SIGHUP under nohup."""
        with restored_signals():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            CleanStop(60).install(trainer_of_nothing())
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    @pytest.mark.parametrize("where", ["before the run", "in Lightning's set-up"])
    def test_control_c_at_the_start_is_one_line(self, tmp_path, capsys, monkeypatch, where):
        def interrupt(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

        owner, name = (cli, "expand_bases") if where == "before the run" else (GuidedSampling, "check")
        monkeypatch.setattr(owner, name, interrupt)
        handlers = [signal.getsignal(number) for number in SIGNALS]
        assert predict(tmp_path / "run") == 130
        assert capsys.readouterr().err.splitlines()[-1] == "calib-guidance: stopped by SIGINT"
        assert [signal.getsignal(number) for number in SIGNALS] == handlers

    def test_or_abandoned(self, tmp_path, capsys):
        folder = tmp_path / "run"
        assert predict(folder, writer={"stop_within": 0.0}, **interrupted({3: "SIGTERM"})) == 4
        assert "stopped by SIGTERM, the current shard was abandoned" in capsys.readouterr().err
        assert list(records(folder)) == ["00000000"]
        assert claims(folder) == []

    def test_slurm_queues_the_job_again_and_no_checkpoint_is_written(self, tmp_path, monkeypatch):
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for name, value in {
            "JOB_ID": "7",
            "JOB_NAME": "sample",
            "NTASKS": "1",
            "PROCID": "0",
            "LOCALID": "0",
            "NODEID": "0",
        }.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        assert predict(tmp_path / "run", **interrupted({0: "SIGUSR1"})) == 4
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]
        assert not list(tmp_path.rglob("*.ckpt"))


class Clock:
    """Stands for the module ``time``."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(clean_stop, "time", Clock())
    return clean_stop.time


def unasked():
    raise AssertionError("nothing is to be waited for")


def trainer_of_nothing():
    return SimpleNamespace(
        strategy=SimpleNamespace(launcher=None),
        default_root_dir="out",
        received_sigterm=False,
        local_rank=0,
        is_global_zero=True,
    )


@pytest.fixture
def stop(clock):
    """Of a run with 60 s to stop in, in a batch of 10 samples that took 20 s the last time, 30 of its shard being left."""
    stop = CleanStop(60)
    with restored_signals():
        stop.install(trainer_of_nothing())
        stop.begin(40)
        clock.now += 20
        stop.end(10, unasked)
        stop.begin(30)
        yield stop


class TestPace:
    """What the measured pace decides, on a clock of the test's own."""

    def test_continues_while_the_shard_can_be_finished(self, stop, clock):
        os.kill(os.getpid(), signal.SIGTERM)  # 60 s for 60 s of work
        for left in (20, 10):
            clock.now += 20
            stop(None)
            stop.end(10, unasked)
            stop.begin(left)
        clock.now += 20
        written = []
        with pytest.raises(StoppedError, match="the current shard was finished"):
            stop.end(10, lambda: written.append(True))
        assert written

    def test_a_shard_that_is_made_has_to_be_written_too(self, stop, clock):
        stop.behind = 1.0
        os.kill(os.getpid(), signal.SIGTERM)  # 60 s for 60 s of work, and writing
        with pytest.raises(StoppedError, match="the current shard was abandoned"):
            stop(None)

    def test_gives_up_at_once_what_cannot_be_finished(self, stop, clock):
        clock.now += 5
        stop.begin(40)  # 80 s of work
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError, match="the current shard was abandoned"):
            stop(None)

    def test_gives_up_when_the_time_is_over(self, stop, clock):
        os.kill(os.getpid(), signal.SIGTERM)
        clock.now += 50  # a batch that takes longer than the last
        with pytest.raises(StoppedError, match="the current shard was abandoned"):
            stop.end(10, unasked)

    def test_a_second_signal_stops_at_once(self, stop, clock):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same, which reached the process twice
        stop(None)
        clock.now += 2
        with pytest.raises(StoppedError, match="SIGINT, at once"):
            os.kill(os.getpid(), signal.SIGINT)

    def test_between_shards_nothing_is_waited_for(self, stop, clock):
        stop.end(30, unasked)
        with pytest.raises(StoppedError, match="between two shards"):
            os.kill(os.getpid(), signal.SIGUSR1)

    def test_refuses_a_negative_time(self):
        with pytest.raises(ConfigurationError, match="stop_within must be a number of seconds of at least 0, got -1"):
            CleanStop(-1)


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path, monkeypatch):
        """A file system of 256 kB; where none may be mounted, a folder that refuses what would not fit into one."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = shutil.which("mount") and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
        )
        if mounted and not mounted.returncode:
            yield disk
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
            return
        sync, page = os.fsync, 4096

        def within(handle):
            sizes = [path.stat().st_size for path in disk.rglob("*") if path.is_file()]
            if sum(-(-size // page) * page for size in sizes) > 256 * 1024:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(os, "fsync", within)
        yield disk

    def test_a_file_system_that_fills_up(self, disk, sound, tmp_path, capsys):
        folder = disk / "run"
        filler = disk / "filler"
        filler.write_bytes(bytes(150_000))
        assert predict(folder, configured=tmp_path / "run", batch_size=2) == 4
        message = capsys.readouterr().err
        done = records(folder)
        assert "is full" in message
        assert f"{len(done)} complete shards are kept. Free disk space (about" in message
        assert 0 < len(done) < 10
        assert claims(folder) == []
        assert not [*folder.rglob("*.tmp"), *folder.rglob(".*.tmp")]
        before = {name: data for name, data in tables(folder).items() if name.removesuffix(".parquet") in done}
        filler.unlink()
        assert predict(folder, configured=tmp_path / "run", batch_size=2) == 0
        assert tables(folder).items() >= before.items()  # what was complete has not been made again
        assert_same(folder, sound)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_disk_that_refuses(self, tmp_path, monkeypatch, capsys, number):
        folder, sync = tmp_path / "run", os.fsync

        def full(handle):
            name = os.readlink(f"/proc/self/fd/{handle}")
            if "00000010.parquet" in name:
                raise OSError(number, os.strerror(number))
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        assert predict(folder) == 4
        message = capsys.readouterr().err
        assert "00000010.parquet needs" in message
        assert "1 complete shards are kept. Free disk space (about" in message
        assert "for the remaining 1" in message
        assert list(records(folder)) == ["00000000"]
        assert list(tables(folder)) == ["00000000.parquet"]
        assert claims(folder) == []


class TestDenoisedImages:
    """The other module that predicts: one step, of its own for each image."""

    def run(self, folder, fault):
        config = yaml.safe_load((ROOT / "lightning_configs/predict/digits_denoised.yaml").read_text())
        config["trainer"]["default_root_dir"] = str(folder)
        init = config["model"]["init_args"]
        init["denoiser"] = {"class_path": "tests.faulty.Faulty", "init_args": {"denoiser": init["denoiser"]} | fault}
        config["data"]["init_args"]["images"]["init_args"]["split"] = "validation"
        config["data"]["init_args"] |= {"draws_per_image": 1, "batch_size": 100}
        folder.with_suffix(".yaml").write_text(yaml.safe_dump(config))
        try:
            main(["predict", "--config", str(folder.with_suffix(".yaml")), *QUICK])
        except SystemExit as stop:
            return stop.code
        return 0

    def test_faults_of_single_images(self, tmp_path):
        assert self.run(tmp_path / "sound", {}) == 0
        sound = samples_of(tmp_path / "sound")
        sevens = sound["label"] == 7
        assert self.run(tmp_path / "mended", {"label": 7, "fault": "overflow", "largest": 40}) == 0
        mended = samples_of(tmp_path / "mended")
        assert torch.equal(mended["t"], sound["t"])
        assert (mended["image"].int() - sound["image"].int()).abs().max() <= 1
        assert self.run(tmp_path / "lost", {"label": 7, "fault": "inf"}) == 3
        lost = samples_of(tmp_path / "lost")
        assert torch.equal(lost["image"], sound["image"][~sevens])
        named = {s["index"]: s["step"] for record in records(tmp_path / "lost").values() for s in record["failed"]}
        assert named == dict(zip(sound["index"][sevens].tolist(), sound["t"][sevens].tolist(), strict=True))
