"""x̂0 and gradients of a few samples, kept with the shards of a run."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
import yaml

from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import TrajectoryStrips
from calib_guidance.cli import main
from calib_guidance.errors import ConfigurationError
from calib_guidance.tasks import GuidedSampling
from tests.conftest import ROOT
from tests.runs import read_samples
from tests.test_faults import FAILING, QUICK, configuration

CHOSEN = [15, 2, FAILING, 99]  # of 20 samples in shards of 10


@pytest.fixture(autouse=True)
def _root(in_root):
    """Paths of the configuration lead from there."""


def predict(folder, strips=True, **settings):
    """A run of 20 samples in 4 steps, with three samples kept."""
    path = configuration(folder, **settings)
    config = yaml.safe_load(path.read_text())
    callbacks = config["trainer"]["callbacks"]
    (entry,) = [c for c in callbacks if c["class_path"].endswith("TrajectoryStrips")]
    entry["init_args"] = {"samples": CHOSEN, "steps": 3}
    if not strips:
        callbacks.remove(entry)
    path.write_text(yaml.safe_dump(config))
    main(["predict", "--config", str(path), *QUICK])


def trajectory(folder):
    with np.load(folder / "trajectory.npz") as file:
        return dict(file)


def assert_same(found, expected, but=()):
    """Up to the rounding of other batch sizes."""
    kept = [row for row, index in enumerate(expected["index"]) if index not in but]
    for name in ("index", "label"):
        assert found[name].tolist() == expected[name][kept].tolist()
    np.testing.assert_array_equal(found["t"], expected["t"])
    assert np.abs(found["x0"].astype(int) - expected["x0"][kept].astype(int)).max() <= 1
    np.testing.assert_allclose(found["gradient"], expected["gradient"][kept], atol=1e-4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run that nothing happens to, and what an observer saw of it, by index and level."""
    folder, seen, attempt = tmp_path_factory.mktemp("strips") / "run", defaultdict(dict), GuidedSampling.attempt

    def watched(module, batch, float32):
        def observe(record):
            x0, gradient = record.guided.prediction.x0, record.guided.aux.gradient
            for row, index in enumerate(batch["index"].tolist()):
                seen[index][record.i] = to_uint8(x0[row]).numpy(), gradient[row].numpy()

        module.context.observers.append(observe)
        try:
            return attempt(module, batch, float32)
        finally:
            module.context.observers.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(GuidedSampling, "attempt", watched)
        predict(folder)
    return folder, seen


def test_file_holds_what_the_sampler_showed(sound):
    folder, seen = sound
    found = trajectory(folder)
    assert found["index"].tolist() == [2, 13, 15]
    assert found["label"].tolist() == [2, 7, 1]
    assert found["t"].tolist() == [999, 666, 0]  # of 0, 333, 666, 999
    assert (found["x0"].dtype, found["gradient"].dtype) == (np.uint8, np.float32)
    assert found["frames_t"].tolist() == [999, 666, 333, 0]
    for row, index in enumerate(found["index"]):
        for place, level in enumerate((3, 2, 1, 0)):
            np.testing.assert_array_equal(found["frames"][row, place], seen[index][level][0])
        for place, level in enumerate((3, 2, 0)):
            x0, gradient = seen[index][level]
            np.testing.assert_array_equal(found["x0"][row, place], x0)
            np.testing.assert_array_equal(found["gradient"][row, place], gradient)


@pytest.mark.parametrize("batch", [3, 20])
def test_batches_shards_and_restarts_change_nothing(sound, tmp_path, batch):
    folder = tmp_path / "run"
    predict(folder, batch_size=batch, shard_size=5, num_samples=8)
    assert trajectory(folder)["index"].tolist() == [2]
    (folder / "shards/00000005.json").unlink()  # of it no chosen sample is
    predict(folder, batch_size=batch, shard_size=5)
    assert_same(trajectory(folder), trajectory(sound[0]))


def test_a_sample_that_is_made_twice_is_kept_once(sound, tmp_path):
    fault = {"label": 7, "step": 333, "fault": "overflow", "largest": 3}
    predict(tmp_path / "run", fault=fault)
    assert_same(trajectory(tmp_path / "run"), trajectory(sound[0]))


def test_a_failed_sample_is_not_there(sound, tmp_path):
    with pytest.raises(SystemExit):
        predict(tmp_path / "run", fault={"label": 7, "step": 333, "fault": "nan"})
    assert_same(trajectory(tmp_path / "run"), trajectory(sound[0]), but=[FAILING])


def test_shards_that_were_made_without_it_are_said(sound, tmp_path, caplog):
    folder = tmp_path / "run"
    predict(folder, strips=False, num_samples=10)
    predict(folder)
    assert "TrajectoryStrips is not in the report" in caplog.text
    assert not (folder / "trajectory.npz").exists()
    assert json.loads((folder / "metrics.json").read_text())["num_samples"] == 20
    images = [part["image"] for part in read_samples(folder / "samples")]
    assert torch.equal(torch.cat(images), torch.cat([p["image"] for p in read_samples(sound[0] / "samples")]))


def test_without_guidance_there_is_no_gradient(tmp_path):
    path = configuration(tmp_path / "run")
    config = yaml.safe_load(path.read_text())
    del config["model"]["init_args"]["guidance"]
    path.write_text(yaml.safe_dump(config))
    main(["predict", "--config", str(path), *QUICK])
    found = trajectory(tmp_path / "run")
    assert np.isnan(found["gradient"]).all()
    assert found["x0"].shape == (4, 4, 1, 8, 8)  # four samples of all four steps, by default


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": []}, "at least one"),
        ({"samples": [1, 1]}, "different"),
        ({"steps": 0}, "steps"),
        ({"frames": -1}, "frames"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        TrajectoryStrips(**settings)
