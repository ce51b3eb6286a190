"""What is measured of the written samples, against the functions themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calib_guidance.callbacks import SampleQuality
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation import FeatureExtractor, Features
from calib_guidance.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)
from calib_guidance.networks import SmallResNet
from calib_guidance.runs import RunFolder
from calib_guidance.runs.context import SamplingContext
from tests.image_files import pictures, write


class Pixels(FeatureExtractor):
    name, width = "pixels", 64

    def forward(self, images):
        return Features(images.flatten(1).float())


def run_and_trainer(folder, count=50):
    pixels, labels = pictures(count, channels=1)
    run = RunFolder.open(write(folder, "run folder", pixels, labels))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(
            context=SamplingContext(),
            check=lambda: None,
            denoiser=SimpleNamespace(image_shape=(1, 8, 8), decode=lambda x: x),
            device=torch.device("cpu"),
        ),
        default_root_dir=str(folder),
        is_global_zero=True,
        global_rank=0,
        world_size=1,
    )
    trainer.lightning_module.context.store = run
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), trainer


def measured(trainer, **options):
    generator = torch.Generator().manual_seed(1)
    reference = [{"image": torch.rand(1, 8, 8, generator=generator) * 2 - 1, "label": i % 3} for i in range(40)]
    quality = SampleQuality(Pixels(), reference, batch_size=8, **options)
    quality.setup(trainer, trainer.lightning_module, "predict")
    real = torch.stack([((r["image"] + 1) * 127.5).floor().flatten() for r in reference])
    return quality.results(trainer), real


@pytest.mark.parametrize("more", [(), ("kid", "dc")], ids=["default", "more"])
def test_is_the_functions_of_the_features(tmp_path, more):
    images, _, trainer = run_and_trainer(tmp_path)
    found, real = measured(trainer, metrics=("fid", "pr", *more)) if more else measured(trainer)
    generated = images.flatten(1).float()
    precision, recall = precision_recall(real, generated)
    expected = {
        "fd": frechet_distance(*mean_and_covariance(real), *mean_and_covariance(generated)),
        "precision": precision,
        "recall": recall,
    }
    if more:
        density, coverage = density_coverage(real, generated)
        assert found.pop("kd_mean") != found["kd"]
        assert found["uncertainty"].pop("kd_mean") != found["uncertainty"]["density"]
        expected |= {"kd": kernel_distance(real, generated), "density": density, "coverage": coverage}
        assert found["uncertainty"]["kd"]["of"] == "one of 100 subsets of 20"
    for name, value in expected.items():
        assert found.pop(name) == pytest.approx(float(value), rel=1e-8), name
    (note,) = found["notes"]
    assert note.startswith("Fréchet distance: 40 samples of 64 features: covariance without full rank")
    assert found["uncertainty"].keys() == expected.keys() - {"fd"}  # which has no derivative there
    assert (found["features"], found["num_reference"], found["num_measured"]) == ("pixels", 40, 50)
    samples = found["provenance"]["samples"]
    assert (samples["uint8_rule"], samples["num_images"]) == ("truncate", 50)
    assert found["provenance"]["reference"]["images"]["uint8_rule"] == "truncate"
    assert not list(tmp_path.rglob("predictions.npz"))


def test_a_fraction_of_all_is_not_certain(tmp_path):
    """Balls that hold all of the reference hold every sample; a bootstrap of that would have a std of 0."""
    _, _, trainer = run_and_trainer(tmp_path)
    found, _ = measured(trainer, metrics=("pr",), k=39)
    assert found["precision"] == 1
    spread = found["uncertainty"]["precision"]
    assert spread == {"std": 0.02, "low": pytest.approx(1 - 1.96 / 50, abs=1e-4), "high": 1, "of": spread["of"]}
    assert spread["of"] == "no difference among 50 samples: 1/50"


def test_an_eval_classifier_beside_the_features_says_what_it_saw(tmp_path):
    images, labels, trainer = run_and_trainer(tmp_path)
    torch.manual_seed(0)
    network = SmallResNet(3).eval()
    found, _ = measured(trainer, eval_classifier=OffTheShelfClassifier(network, 3))
    p = network(images / 127.5 - 1).softmax(1)
    correct = (p.argmax(1) == labels).double()
    assert found["classifier_accuracy"] == pytest.approx(float(correct.mean()))
    spread = found["uncertainty"]["classifier_accuracy"]
    assert spread["std"] == pytest.approx(float((correct.mean() * (1 - correct.mean()) / 50).sqrt()), rel=0.2)
    with np.load(trainer.lightning_module.context.store.path / "predictions.npz") as file:
        assert np.array_equal(file["index"], np.arange(50))
        assert np.array_equal(file["label"], labels)
        assert np.array_equal(file["predicted"], p.argmax(1))
        np.testing.assert_allclose(file["confidence"], p.gather(1, labels[:, None])[:, 0].detach(), atol=1e-5)


def test_what_cannot_be_measured_is_refused_before_sampling(tmp_path):
    _, _, trainer = run_and_trainer(tmp_path)
    color = OffTheShelfClassifier(SmallResNet(3, 3).eval(), 3)
    with pytest.raises(ConfigurationError, match="the evaluation classifier cannot be taken of images 1×8×8"):
        measured(trainer, eval_classifier=color)
    for name, (pixels, labels), message in (
        ("rgb", pictures(9), "the run has images 8×8 gray, the reference .*rgb.* 8×8 RGB: they cannot be compared"),
        ("large", pictures(9, channels=1, size=16), "the run has images 8×8 gray, the reference .*large.* 16×16 gray"),
    ):
        quality = SampleQuality(Pixels(), str(write(tmp_path / name, "npz", pixels, labels)))
        with pytest.raises(ConfigurationError, match=message):
            quality.setup(trainer, trainer.lightning_module, "predict")


def test_a_reference_of_statistics_leaves_out_what_needs_images(tmp_path):
    images, _, trainer = run_and_trainer(tmp_path)
    real = images[::2].flatten(1).double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    quality = SampleQuality(Pixels(), str(tmp_path / "statistics.npz"))
    quality.setup(trainer, trainer.lightning_module, "predict")
    found = quality.results(trainer)
    expected = frechet_distance(*mean_and_covariance(torch.from_numpy(real)), *mean_and_covariance(images.flatten(1)))
    assert found["fd"] == pytest.approx(float(expected), rel=1e-6)
    assert "precision" not in found
    assert any(note.startswith("pr skipped: the reference holds no features") for note in found["notes"])
