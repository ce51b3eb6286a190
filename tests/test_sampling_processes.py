"""Sampling with several processes: what docs/cluster.md says, and how few samples they can have."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from calib_guidance.cli import main
from tests import processes
from tests.conftest import ROOT
from tests.runs import QUICK, flip, metrics_without_time, samples_of, tables


def configuration(path, callbacks=()):
    """The digits configuration, small and without its evaluation classifier."""
    config = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())
    writer, _, *measurements, report = config["trainer"]["callbacks"]
    report["init_args"] = {"plots": False}
    config["trainer"]["callbacks"] = [writer, *callbacks, *measurements, report]
    config["model"]["init_args"]["sampler"]["init_args"]["steps"] = "3"
    path.write_text(yaml.safe_dump(config))
    return path


def words(config, folder, samples, batch, shard):
    data = {"num_samples": samples, "batch_size": batch, "shard_size": shard}
    options = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    return ["predict", f"--config={config}", f"--trainer.default_root_dir={folder}", *options, *QUICK]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)} | more


def indices(folder):
    return samples_of(folder)["index"].tolist()


def is_complete(folder):
    """What `status --verify` says, by its exit status 0."""
    main(["status", str(folder), "--verify"])


def test_as_few_samples_as_there_are(in_root, tmp_path):
    """Three ranks with 1, 7 and 17 samples, and with 1 and 3 that are left: exactly so many, and every rank ends with 0."""
    config = configuration(tmp_path / "run.yaml")
    ddp = ["--trainer.devices=3", "--trainer.strategy=ddp"]
    asked = [("one", 1, 4), ("seven", 7, 4), ("seventeen", 17, 4), ("grown", 4, 1), ("grown", 5, 1), ("grown", 8, 1)]
    for name, n, shard in asked:
        processes.succeed(*words(config, tmp_path / name, n, 2, shard), *ddp, ranks=3)
    for name, samples in (("one", 1), ("seven", 7), ("seventeen", 17), ("grown", 8)):
        assert indices(tmp_path / name) == list(range(samples))
        assert metrics_without_time(tmp_path / name)["num_samples"] == samples
        is_complete(tmp_path / name)
    makers = {json.loads(p.read_text())["worker"] for p in (tmp_path / "grown/shards").glob("*.json")}
    assert len(makers) > 3  # the ranks of three runs
    main(words(config, tmp_path / "alone", 17, 2, 4))
    assert tables(tmp_path / "seventeen") == tables(tmp_path / "alone")
    assert metrics_without_time(tmp_path / "seventeen") == metrics_without_time(tmp_path / "alone")
    with (
        np.load(tmp_path / "seventeen/trajectory.npz") as found,
        np.load(tmp_path / "alone/trajectory.npz") as expected,
    ):
        assert found["index"].tolist() == [0, 1, 2, 3]
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_a_rank_is_killed_under_torchrun(in_root, tmp_path):
    """The recipe of docs/cluster.md, with a SIGKILL to the second of two processes in its third batch."""
    kill = {"class_path": "tests.interruptions.KillRank", "init_args": {"rank": 1, "batch": 2}}
    config = configuration(tmp_path / "killed.yaml", [kill])
    torchrun = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "-m", "calib_guidance"]
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    # Else the workers that are started again may read the addresses of those before.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    argv = [*torchrun, *words(config, tmp_path / "two", 26, 2, 4), *ddp]
    done = processes.run(*argv, environment=fresh, function="tests.processes:torchrun")
    assert done.statuses == [0], done.output[-3000:]
    assert "exitcode: -9" in done.output
    made = [json.loads(path.read_text())["worker"] for path in sorted((tmp_path / "two/shards").glob("*.json"))]
    assert len(set(made)) >= 2  # those who were started again went on with what there was
    assert indices(tmp_path / "two") == list(range(26))
    is_complete(tmp_path / "two")
    main(words(configuration(tmp_path / "complete.yaml"), tmp_path / "one", 26, 2, 4))
    assert tables(tmp_path / "two") == tables(tmp_path / "one")
    assert metrics_without_time(tmp_path / "two") == metrics_without_time(tmp_path / "one")


SCRIPTS = ["slurm_sample.sh", "slurm_sample_array.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_scripts_run_what_there_is(in_root, tmp_path, script, capsys):
    """What they give to srun is a command that the parser takes; srun's exit status is theirs."""
    stand_in = tmp_path / "srun"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit 3\n')
    stand_in.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", f"docs/{script}"], env=environment(**slurm), capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    program, *command = (tmp_path / "words").read_text().splitlines()
    assert program == ".venv/bin/calib-guidance"
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert stop.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    lines = (ROOT / "docs" / script).read_text().splitlines()
    asked = dict(line[8:].split("=", 1) for line in lines if line.startswith("#SBATCH") and "=" in line)
    tasks = int(asked["--ntasks-per-node"]) * int(asked["--nodes"]) if "--nodes" in asked else int(asked["--ntasks"])
    assert int(trainer["devices"]) * int(trainer["num_nodes"]) == tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete run of 18 samples, for others that begin with copies."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main(words(configuration(folder / "run.yaml"), folder / "run", 18, 4, 4))
    return folder / "run"


@pytest.mark.parametrize(
    ("spoil", "found", "status"),
    [
        (lambda f: flip(f / "samples/00000008.parquet"), "8–11: 00000008.parquet is not what was written", 3),
        (lambda f: os.truncate(f / "samples/00000008.parquet", 99), "8–11: 00000008.parquet has 99 bytes", 3),
        (lambda f: (f / "samples/00000008.parquet").unlink(), "8–11: 00000008.parquet is missing", 3),
        (lambda f: [p.unlink() for p in f.glob("*/00000008*")], "open:\n  8–11", 1),
        (lambda f: (f / "samples/00000002.parquet").write_bytes(b"PAR1"), "samples/00000002.parquet", 3),
    ],
    ids=["flipped byte", "truncated", "missing samples", "missing shard", "foreign file"],
)
def test_damage_is_found_and_only_it_is_made_again(made, in_root, tmp_path, capsys, caplog, spoil, found, status):
    shutil.copytree(made, tmp_path / "run")
    command = words(configuration(tmp_path / "run.yaml"), tmp_path / "run", 18, 4, 4)
    before, numbers = tables(tmp_path / "run"), metrics_without_time(tmp_path / "run")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/samples").iterdir()}
    spoil(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        is_complete(tmp_path / "run")
    assert stop.value.code == status
    assert found in capsys.readouterr().out
    main(command)
    foreign = tmp_path / "run/samples/00000002.parquet"
    if foreign.exists():  # named, not counted, and not removed: it may be somebody's
        assert "samples/00000002.parquet" in caplog.text
        foreign.unlink()
    is_complete(tmp_path / "run")
    assert tables(tmp_path / "run") == before
    assert metrics_without_time(tmp_path / "run") == numbers
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/samples").iterdir()}
    again = {name for name in now if now[name] != written[name]}
    assert again == (set() if "00000002" in found else {"00000008.parquet"})


@pytest.mark.slow
def test_no_rank_outlives_rank_0_under_lightnings_launcher(in_root, tmp_path):
    """SIGKILL to it: the other one finishes its shard and ends, long before all samples are made, and a re-run resumes."""
    kill = {"class_path": "tests.interruptions.KillRank", "init_args": {"rank": 0, "batch": 2}}
    config = configuration(tmp_path / "killed.yaml", [kill])
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-m", "calib_guidance", *words(config, tmp_path / "two", 4000, 2, 4), *ddp]
    # Ends when no process holds the pipes any more.
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == -9
    assert "SIGTERM" in done.stderr
    written = len(indices(tmp_path / "two"))
    assert 0 < written < 4000
    main(words(configuration(tmp_path / "again.yaml"), tmp_path / "two", 4, 2, 4))  # its own claims are not in the way
    is_complete(tmp_path / "two")
