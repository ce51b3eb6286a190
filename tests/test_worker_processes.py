"""Processes that one predict command forks on the CPU: they share a run, and what ends one of them."""

import json
import re
import time
from pathlib import Path

import pytest

from calib_guidance.backend.atomic import is_alive
from calib_guidance.callbacks import processes as forks
from calib_guidance.cli import main
from tests import processes
from tests.runs import metrics_without_time, refused, tables
from tests.test_sampling_processes import configuration, words

SAMPLES = 20, 2, 2  # shards of one batch of two


def act(worker, batch, name="SIGKILL"):
    init_args = {"worker": worker, "batch": batch, "name": name}
    return [{"class_path": "tests.interruptions.ByWorker", "init_args": init_args}]


def makers(folder):
    """Names of the workers whose shards are complete."""
    return {json.loads(path.read_text())["worker"] for path in Path(folder).glob("shards/*.json")}


def is_complete(folder):
    main(["status", str(folder), "--verify"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(processes.ROOT)
        main(words(configuration(folder / "run.yaml"), folder / "run", *SAMPLES))
    assert len(makers(folder / "run")) == 1  # from Python, one process is the default
    return folder / "run"


def test_samples_and_metrics_are_those_of_one_process(alone, tmp_path):
    """Sums that are added shard by shard, too."""
    argv = words(configuration(tmp_path / "run.yaml"), tmp_path / "run", *SAMPLES)
    argv.remove("--trainer.enable_progress_bar=false")
    done = processes.run(*argv, "--workers=3")
    assert done.statuses == [0], done.output[-3000:]
    assert len(makers(tmp_path / "run")) == 3
    assert tables(tmp_path / "run") == tables(alone)
    assert metrics_without_time(tmp_path / "run") == metrics_without_time(alone)
    assert done.output.count("samples, 3 NFE each") == done.output.count("in place of ReLU changes") == 1
    assert "3 processes with 1 CPU threads each" in done.output
    assert "20/20" in done.output  # the bar counts images of all
    is_complete(tmp_path / "run")


@pytest.mark.parametrize("worker", [0, 1])
def test_a_process_is_killed(alone, tmp_path, worker):
    """Without the first the others end, too; re-running the command completes the run. Without another the first completes it."""
    config = configuration(tmp_path / "killed.yaml", act(worker, 1))
    done = processes.run(*words(config, tmp_path / "run", *SAMPLES), "--workers=2")
    if worker:
        assert "was killed by SIGKILL" in done.output
    else:
        # Each process claims a shard before it makes one: the names of both are known here.
        names = {json.loads(path.read_text())["worker"] for path in (tmp_path / "run").glob("claims/0*")}
        for _ in range(600):
            if not any(map(is_alive, names | makers(tmp_path / "run"))):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("a process outlives the one that started it")
        assert done.statuses == [-9]
        done = processes.run(*words(configuration(tmp_path / "run.yaml"), tmp_path / "run", *SAMPLES))
    assert done.statuses == [0], done.output[-3000:]
    assert tables(tmp_path / "run") == tables(alone)
    assert metrics_without_time(tmp_path / "run") == metrics_without_time(alone)


def test_half_written_files_of_a_killed_worker_are_gone_when_the_run_is_complete(alone, in_root, tmp_path):
    """The file is named after a dead process, and was written after the run had started."""
    init_args = {"folder": str(tmp_path / "run"), "batch": 3}
    left = [{"class_path": "tests.interruptions.HalfWritten", "init_args": init_args}]
    main(words(configuration(tmp_path / "run.yaml", left), tmp_path / "run", *SAMPLES))
    assert tables(tmp_path / "run") == tables(alone)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize(
    ("name", "status", "said"), [("SIGINT", 4, "stopped by SIGINT"), ("error", 1, "made by the test")]
)
def test_a_stop_and_an_error_are_told_once(tmp_path, worker, name, status, said):
    """A signal to the first process stops all; one to another stops that one alone."""
    config = configuration(tmp_path / "run.yaml", act(worker, 1, name))
    done = processes.run(*words(config, tmp_path / "run", *SAMPLES), "--workers=2")
    assert done.statuses == [0 if (worker, name) == (1, "SIGINT") else status], done.output[-3000:]
    if done.statuses == [0]:
        is_complete(tmp_path / "run")
        assert "was stopped (status 4); the others continue" in done.output
    elif name == "error":  # with the traceback of the process that it was raised in
        assert done.output.count(f"KeyError: '{said}'") == 1 + worker
        assert len(re.findall(r"in worker process \d", done.output)) == worker
    else:
        assert done.output.count(said) == 1
    assert not list((tmp_path / "run").glob("claims/0*"))


def test_memory_bounds_their_number(in_root, tmp_path, monkeypatch, capsys):
    """Asked for, too many are refused; left to the command, there are as many as fit."""
    argv = words(configuration(tmp_path / "run.yaml"), tmp_path / "run", *SAMPLES)
    monkeypatch.setattr(forks, "free_memory", lambda device: 7e8)
    message = refused(capsys, *argv, "--workers=9")
    assert "of memory, and 0.7 GB are free: set it to 3 or less" in message
    assert "limit_predict_batches" in refused(capsys, *argv, "--workers=2", "--trainer.limit_predict_batches=3")
    assert not list((tmp_path / "run").glob("samples/*"))
