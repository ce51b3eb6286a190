"""How good the samples are."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MetricCollection

from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.images import to_uint8
from calib_guidance.metrics import (
    DensityCoverage,
    FeatureExtractor,
    Features,
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    sample_count_note,
)
from calib_guidance.run_folder import RunFolder


class SampleQuality(Measurement):
    """Fréchet distance, precision and recall against reference images, and accuracy where the features come from a judge.

    Measured on the written images of the whole folder, when all are there; ranks share them out.

    Args:
        features: the extractor, :class:`~calib_guidance.metrics.JudgeFeatures` or
            :class:`~calib_guidance.metrics.InceptionFeatures`.
        reference: data set of {image in [-1, 1], label, index} that nothing was trained on.
        k: neighbours for precision and recall.
        uint8_rule: of the reference, see :func:`calib_guidance.images.to_uint8`.
        batch_size: images at a time.
        kid: also the kernel Inception distance: of the whole sets, and mean ± spread of 100 subsets of 1,000 where both sets
            have as many.
        density_coverage: also density and coverage, of 5 neighbours.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Dataset,
        k: int = 3,
        uint8_rule: str = "truncate",
        batch_size: int = 250,
        kid: bool = False,
        density_coverage: bool = False,
    ):
        self.features, self.reference, self.k = features, reference, k
        self.uint8_rule, self.batch_size = uint8_rule, batch_size
        self.kid, self.density_coverage = kid, density_coverage

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        device = trainer.strategy.root_device
        self.features.eval().to(device)
        loader = DataLoader(self.reference, self.batch_size)
        rule = self.uint8_rule
        found = torch.cat([self._extract(to_uint8(batch["image"].to(device), rule)).pool for batch in loader])
        metrics = {
            "frechet_distance": FrechetDistance(found, full_rank=False),
            "precision_recall": PrecisionRecall(found, self.k),
        }
        if self.kid:
            metrics["kid"] = KernelDistance(found)
        if self.density_coverage:
            metrics["density_coverage"] = DensityCoverage(found)
        self.distances = MetricCollection(metrics, compute_groups=False).to(device)
        self.width = found.shape[1]
        self.accuracy = MeanMetric().to(device)

    def _extract(self, images: Tensor) -> Features:
        with torch.no_grad():
            return self.features(images)

    def _measure(self, trainer: L.Trainer) -> None:
        """This rank's share of the written samples."""
        folder: RunFolder = trainer.datamodule.run_folder.whole()
        for shard in folder.shards()[trainer.global_rank :: trainer.world_size]:
            columns = {key: torch.from_numpy(column) for key, column in folder.read(shard).items()}
            if not len(columns["label"]):
                continue
            batches = (columns[key].split(self.batch_size) for key in ("image", "label", "index"))
            for images, labels, index in zip(*batches, strict=True):
                features, _, logits = self._extract(images.to(trainer.strategy.root_device))
                self.distances.update(features=features, index=index)
                if logits is not None:
                    self.accuracy.update((logits.argmax(1).cpu() == labels).float().to(features.device))

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        self._measure(trainer)
        with torch.no_grad():
            values = self.distances.compute()
        accuracy = compute(self.accuracy, trainer)
        if not accuracy.isnan():
            values["judge_accuracy"] = accuracy
        num_samples = trainer.datamodule.run_folder.whole().num_requests
        note = sample_count_note(min(num_samples, len(self.reference)), self.width)
        return {
            **{name: float(value) for name, value in values.items()},
            **({"frechet_distance_note": note} if note else {}),
            "features": self.features.name,
            "num_reference": len(self.reference),
        }
