"""What is measured of the written samples, against the functions themselves."""

import math
from types import SimpleNamespace

import pytest
import torch

from calib_guidance.callbacks import SampleQuality
from calib_guidance.metrics import (
    FeatureExtractor,
    Features,
    density_coverage,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)


class Pixels(FeatureExtractor):
    name, width = "pixels", 4

    def forward(self, images):
        return Features(images.flatten(1).float())


class Shards:
    """The written samples of a run: three shards of images 2×2, of which the last is short."""

    num_requests = 50

    def __init__(self):
        index = torch.arange(self.num_requests)
        images = torch.randint(0, 200, (self.num_requests, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        self.columns = {"image": images.to(torch.uint8), "label": index % 10, "index": index}

    def whole(self):
        return self

    def shards(self):
        return [range(0, 20), range(20, 40), range(40, 50)]

    def read(self, shard):
        return {key: column[shard.start : shard.stop].numpy() for key, column in self.columns.items()}


@pytest.mark.parametrize("options", [{}, {"kid": True, "density_coverage": True}], ids=["default", "all"])
def test_is_the_functions_of_the_features(options):
    generator = torch.Generator().manual_seed(1)
    reference = [{"image": torch.rand(1, 2, 2, generator=generator) * 2 - 1} for _ in range(40)]
    folder = Shards()
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(run_folder=folder),
        global_rank=0,
        world_size=1,
    )
    quality = SampleQuality(Pixels(), reference, batch_size=8, **options)
    quality.setup(trainer, None, "predict")
    found = quality.results(trainer)
    generated = folder.columns["image"].flatten(1).float()
    real = torch.stack([((r["image"] + 1) * 127.5).floor().flatten() for r in reference])
    precision, recall = precision_recall(real, generated)
    expected = {
        "frechet_distance": frechet_distance(*mean_and_covariance(real), *mean_and_covariance(generated)),
        "precision": precision,
        "recall": recall,
    }
    if options:
        density, coverage = density_coverage(real, generated)
        expected |= {"kernel_distance": kernel_distance(real, generated), "density": density, "coverage": coverage}
        # 40 are too few for subsets of 1,000.
        assert all(math.isnan(found.pop(f"kernel_distance_{name}")) for name in ("mean", "sd"))
    for name, value in expected.items():
        assert found.pop(name) == pytest.approx(float(value), rel=1e-9), name
    note = found.pop("frechet_distance_note")
    assert note == "40 samples: biased upwards, comparable only at the same number"
    assert found == {"features": "pixels", "num_reference": 40}
