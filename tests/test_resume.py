"""Training that is killed and resumes: the same samples, the same weights."""

import json
import os

import pytest
import torch
import yaml

from calib_guidance.cli import main
from calib_guidance.errors import ConfigurationError, StoppedError
from calib_guidance.experiments import runner
from calib_guidance.weights.io import read_weights
from tests import processes
from tests.conftest import ROOT

EPOCHS, STEPS, EVERY = 3, 4, 3  # steps an epoch, and steps between checkpoints
KILLED = 6  # in the second epoch; the last checkpoint is of step 6, in its middle, the one before it of step 3


def configuration(folder, *, killed=None, signal="SIGKILL", workers=0):
    """A short run of the digits' calibration configuration, as a YAML that writes into ``folder``."""
    config = yaml.safe_load((ROOT / "lightning_configs/fit/digits_calibration.yaml").read_text())
    config["model"]["init_args"]["classifier"]["init_args"]["network"]["init_args"]["widths"] = [8, 16]
    init = config["trainer"]["callbacks"][0]["init_args"]
    init["every_n_train_steps"] = EVERY
    config["trainer"]["callbacks"][1]["init_args"] = {"plots": False}
    record = {"class_path": "tests.interruptions.Record", "init_args": {"folder": str(folder / "seen")}}
    config["trainer"]["callbacks"].append(record)
    if killed is not None:
        interrupt = {"class_path": "tests.interruptions.Interrupt", "init_args": {"step": killed, "name": signal}}
        config["trainer"]["callbacks"].insert(0, interrupt)
    config["trainer"] |= {"max_epochs": EPOCHS, "default_root_dir": str(folder), "accelerator": "cpu", "logger": False}
    config["trainer"] |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": EPOCHS,
    }
    config["data"]["init_args"] |= {"batch_size": 250, "heldout_draws": 1, "rotate": 10.0}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fit.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(folder, *arguments, environment=(), ranks=None, **settings):
    """One process that fits, or several; the exit status of the first and the output of all."""
    words = ["fit", "--config", configuration(folder, **settings), *arguments]
    done = processes.run(*words, ranks=ranks, environment=environment)
    assert len({*done.statuses}) == 1, done.output[-3000:]
    return done.statuses[0], done.output


def seen(folder, rank=0):
    lines = (folder / f"seen/rank{rank}.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def weights(folder):
    return read_weights(folder / "classifier.safetensors").state


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main(["fit", "--config", str(configuration(folder))])
    return folder


def assert_continued(folder, complete, first_step, rank=0, killed=KILLED):
    """What was seen before and after is what the uninterrupted run saw, with only the steps since the checkpoint twice."""
    found, expected = seen(folder, rank), seen(complete, rank)
    assert len(expected) == EPOCHS * STEPS
    assert found[:killed] == expected[:killed]
    assert found[killed:] == expected[first_step:]
    for epoch in range(EPOCHS):
        rows = [row for number, _, batch in found[killed:] if number == epoch for row in batch]
        assert len(rows) == len(set(rows))  # each remaining sample once


def test_a_killed_run_resumes_to_the_same_weights(complete, tmp_path):
    status, output = fit(tmp_path, "--ckpt_path=last", killed=KILLED)  # nothing to resume from: it begins
    assert status == -9, output[-3000:]
    assert len(seen(tmp_path)) == KILLED
    status, output = fit(tmp_path, "--ckpt_path=last")
    assert status == 0, output[-3000:]
    assert_continued(tmp_path, complete, KILLED)
    found, expected = weights(tmp_path), weights(complete)
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # bit for bit


def test_a_truncated_checkpoint_falls_back_to_the_one_before(complete, tmp_path):
    status, _ = fit(tmp_path, killed=KILLED)
    assert status == -9
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    status, output = fit(tmp_path, "--ckpt_path=last")
    assert status == 0, output[-3000:]
    assert "last.ckpt is corrupted: resuming from the previous checkpoint" in output.replace("\n", " ")
    assert_continued(tmp_path, complete, EVERY)
    found, expected = weights(tmp_path), weights(complete)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.rglob("*.tmp"))


def test_nothing_to_fall_back_to_is_an_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"PK half a file")
    status, output = fit(tmp_path, "--ckpt_path=last")
    assert status == 2
    assert "is corrupted, and there is no previous checkpoint" in output


def test_a_run_of_an_experiment_does_what_is_left(complete, tmp_path, monkeypatch, in_root):
    """Stopped while it trains, then by its second command: training continues, and is not done again when it is complete."""
    folder, needed = tmp_path / "fit", tmp_path / "later.safetensors"
    fit = ("fit", "--config", str(configuration(folder, killed=KILLED, signal="SIGTERM")))
    predict = ("predict", "--config", "digits", "--data.num_samples=4", f"--model.denoiser.checkpoint={needed}")
    commands = [
        (*words, f"--trainer.default_root_dir={tmp_path / words[0]}", "--trainer.accelerator=cpu")
        for words in (fit, (*predict, "--trainer.callbacks=SampleWriter"))
    ]
    run = runner.Run(0, 0, tuple(commands), tmp_path)
    once, all_steps = KILLED + 1, EPOCHS * STEPS
    for steps, error in ((once, StoppedError), (all_steps, ConfigurationError), (all_steps, ConfigurationError)):
        with pytest.raises(error):
            runner.work(run, 1)
        assert len(seen(folder)) == steps
        assert not run.done()
    assert_continued(folder, complete, once, killed=once)
    assert all(torch.equal(value, weights(complete)[name]) for name, value in weights(folder).items())
    needed.write_bytes((ROOT / "checkpoints/digits/diffusion.safetensors").read_bytes())
    runner.work(run, 1)
    assert run.done()
    assert len(seen(folder)) == all_steps


@pytest.mark.slow
def test_two_processes_resume_too(tmp_path):
    """Both processes killed; each resumes with its own samples."""
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=125")
    status, output = fit(tmp_path / "complete", *ddp, ranks=2)
    assert status == 0, output[-3000:]
    status, _ = fit(tmp_path / "killed", *ddp, ranks=2, killed=KILLED)
    assert status == -9
    assert [len(seen(tmp_path / "killed", rank)) for rank in (0, 1)] == [KILLED, KILLED]
    status, output = fit(tmp_path / "killed", *ddp, "--ckpt_path=last", ranks=2)
    assert status == 0, output[-3000:]
    for rank in (0, 1):
        assert_continued(tmp_path / "killed", tmp_path / "complete", KILLED, rank)
    mine, other = ({row for _, _, batch in seen(tmp_path / "complete", r)[:STEPS] for row in batch} for r in (0, 1))
    assert not mine & other
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "complete")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_slurm_takes_the_nodes_away(complete, tmp_path):
    """SIGUSR1 under SLURM: Lightning writes a checkpoint and queues the job again, and the same command resumes from it."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\nkill -9 $PPID\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
    }
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    out = tmp_path / "out"
    status, output = fit(out, "--ckpt_path=last", killed=KILLED, signal="SIGUSR1", environment=slurm)
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"], output[-3000:]
    assert status == -9
    # The signal came in the middle of a step, whose batch was learned from before anything was written.
    assert [p.name for p in out.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    stopped = len(seen(out))
    assert KILLED < stopped < EPOCHS * STEPS
    status, output = fit(out, "--ckpt_path=last", environment=slurm)
    assert status == 0, output[-3000:]
    assert seen(out) == seen(complete)
    found, expected = weights(out), weights(complete)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
