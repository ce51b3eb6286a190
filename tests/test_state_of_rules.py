"""Rules, negatives and gradients with a state of each sample, in runs that are stopped, shared, halved and retried."""

import re

import pytest
import torch
import yaml

from calib_guidance.cli import main
from tests import processes
from tests.conftest import ROOT
from tests.runs import samples_of, tables
from tests.test_sampling_processes import words

pytestmark = pytest.mark.usefixtures("in_root")

SAMPLES = 12
RULES = {
    # Momentum over all steps, and two negatives, one of random labels.
    "apg": {
        "rule": {"class_path": "APG", "init_args": {"weight": 2.0, "momentum": -0.5}},
        "negative": {
            "class_path": "TwoNegatives",
            "init_args": {"first": {"class_path": "Unconditional"}, "second": {"class_path": "IndependentCondition"}},
        },
    },
    # A posterior that is updated after every step.
    "feedback": {
        "rule": {"class_path": "FeedbackGuidance", "init_args": {"temperature": 0.05, "offset": -0.5, "pi": 0.7}},
        "negative": {"class_path": "PerturbedTime", "init_args": {"scale": 0.5}},
    },
}


def configuration(path, name, callbacks=(), **fault):
    """Digits with labels, a classifier on top whose gradients are averaged over steps, and where asked a fault."""
    config = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "SampleWriter"}, *callbacks]
    init = config["model"]["init_args"]
    init["sampler"] = {"class_path": "DDPM", "init_args": {"steps": "4"}}
    init["guidance"]["init_args"]["stabilizer"] = {"ema": 0.9}
    model = init["denoiser"]
    model["init_args"]["class_conditional"] = True
    if fault:
        model = {"class_path": "tests.faulty.Faulty", "init_args": {"denoiser": model} | fault}
    init["denoiser"] = {"class_path": "Combination", "init_args": {"denoiser": model} | RULES[name]}
    path.write_text(yaml.safe_dump(config))
    return path


def predict(folder, name, batch=6, shard=6, **options):
    config = configuration(folder.with_suffix(".yaml"), name, **options)
    main(words(config, folder, SAMPLES, batch, shard))
    return samples_of(folder)


def assert_same(found, expected):
    """Up to a gray level where rounding of other batch sizes tips one."""
    assert torch.equal(found["index"], expected["index"])
    assert (found["image"].int() - expected["image"].int()).abs().max() <= 1


@pytest.mark.parametrize("name", RULES)
def test_every_way_to_the_samples_leads_to_the_same(name, tmp_path, caplog):
    sound = predict(tmp_path / "sound", name)
    # Stopped after a shard, and continued with other batches.
    stop = {"class_path": "tests.interruptions.StopAfter", "init_args": {"batches": 1}}
    with pytest.raises(KeyError, match="stopped by the test"):
        predict(tmp_path / "stopped", name, callbacks=[stop])
    assert len(tables(tmp_path / "stopped")) == 1
    assert_same(predict(tmp_path / "stopped", name, batch=1), sound)
    # Out of memory in the middle of a batch: half of it begins again. (Label -1 is none, of a negative.)
    assert_same(predict(tmp_path / "halved", name, label=-2, largest=7, step=333), sound)
    assert "out of memory with 6 samples at a time" in caplog.text
    # A sample that is not finite begins again, in float32. (A negative of a random label may be the one that fails.)
    assert_same(predict(tmp_path / "retried", name, label=7, step=333, fault="overflow"), sound)
    again = re.findall(r"not finite, sampling again in float32: ([\d, ]+)", caplog.text)
    failed = [int(index) for line in again for index in line.split(", ")]
    assert 7 in failed
    assert len(failed) < SAMPLES
    assert "failed samples" not in caplog.text


def test_two_ranks_make_the_samples_of_one(tmp_path):
    sound = predict(tmp_path / "sound", "apg", batch=2, shard=2)
    config = configuration(tmp_path / "ranks.yaml", "apg")
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    processes.succeed(*words(config, tmp_path / "ranks", SAMPLES, 2, 2), *ddp, ranks=2)
    assert tables(tmp_path / "ranks") == tables(tmp_path / "sound")
    assert sound["index"].tolist() == list(range(SAMPLES))
