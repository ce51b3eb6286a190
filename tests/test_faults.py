"""Sampling through faults: numbers that are not finite, memory that does not suffice, disks that are full, signals."""

import json

import pytest
import torch
import yaml

from calib_guidance.callbacks import read_samples
from calib_guidance.cli import main
from tests.conftest import ROOT

SAMPLES, BATCH, STEPS = 20, 10, 4
FAILING = 13  # the one sample of class 7
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _root(in_root):
    """Paths of the configuration lead from there."""


def configuration(folder, *, fault=None, callbacks=(), score=None, **data):
    """The digits configuration, small, with trajectory measurements and with a faulty denoiser where asked."""
    config = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())
    kept = [c for c in config["trainer"]["callbacks"] if not c["class_path"].endswith(("Quality", "RunReport"))]
    report = {"class_path": "calib_guidance.callbacks.RunReport", "init_args": {"figures": False}}
    config["trainer"]["callbacks"] = [*kept, *callbacks, report]
    config["trainer"]["default_root_dir"] = str(folder)
    init = config["model"]["init_args"]
    init["sampler"]["init_args"]["steps"] = str(STEPS)
    if fault:
        init["denoiser"] = {"class_path": "tests.faulty.Faulty", "init_args": {"denoiser": init["denoiser"]} | fault}
    if score:
        init["guidance"]["init_args"]["score"] = score
    folder.mkdir(parents=True, exist_ok=True)
    labels = folder.with_suffix(".labels")
    labels.write_text("\n".join("7" if i == FAILING else str(i % 7) for i in range(100)))
    config["data"]["init_args"] |= {"num_samples": SAMPLES, "batch_size": BATCH, "labels": str(labels)} | data
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def predict(folder, **settings):
    """Exit status of one run."""
    try:
        main(["predict", "--config", str(configuration(folder, **settings)), *QUICK])
    except SystemExit as stop:
        return stop.code
    return 0


def samples_of(folder):
    parts = list(read_samples(folder / "samples"))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert predict(folder) == 0
    return folder


def assert_same(folder, sound, but=()):
    """The same samples, up to a grey level where rounding of other batch sizes tips one."""
    found, expected = samples_of(folder), samples_of(sound)
    rows = [row for row in range(SAMPLES) if row not in but]
    assert found["index"].tolist() == rows
    assert torch.equal(found["label"], expected["label"][rows])
    assert (found["image"].int() - expected["image"][rows].int()).abs().max() <= 1


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


STEP = 500  # of the respaced steps 0, 333, 666, 999
