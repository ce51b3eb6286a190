"""How good the samples are."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.images import to_uint8
from calib_guidance.metrics import FeatureExtractor, FrechetDistance, PrecisionRecall
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
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Dataset,
        k: int = 3,
        uint8_rule: str = "truncate",
        batch_size: int = 250,
    ):
        self.features, self.reference, self.k = features, reference, k
        self.uint8_rule, self.batch_size = uint8_rule, batch_size

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        device = trainer.strategy.root_device
        self.features.eval().to(device)
        loader = DataLoader(self.reference, self.batch_size)
        rule = self.uint8_rule
        found = torch.cat([self._extract(to_uint8(batch["image"].to(device), rule))[0] for batch in loader])
        self.frechet = FrechetDistance(found, full_rank=False).to(device)
        self.precision_recall = PrecisionRecall(found, self.k).to(device)
        self.accuracy = MeanMetric().to(device)

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return self.features(images)

    def _measure(self, trainer: L.Trainer) -> None:
        """This rank's share of the written samples."""
        folder: RunFolder = trainer.datamodule.run_folder.whole()
        for shard in folder.shards()[trainer.global_rank :: trainer.world_size]:
            columns = {key: torch.from_numpy(column) for key, column in folder.read(shard).items()}
            if not len(columns["label"]):
                continue
            batches = (columns[key].split(self.batch_size) for key in ("image", "label"))
            for images, labels in zip(*batches, strict=True):
                features, logits = self._extract(images.to(trainer.strategy.root_device))
                self.frechet.update(features)
                self.precision_recall.update(features)
                if logits is not None:
                    self.accuracy.update((logits.argmax(1).cpu() == labels).float().to(features.device))

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        self._measure(trainer)
        values = {"frechet_distance": compute(self.frechet, trainer), **compute(self.precision_recall, trainer)}
        accuracy = compute(self.accuracy, trainer)
        if not accuracy.isnan():
            values["judge_accuracy"] = accuracy
        return {
            **{name: float(value) for name, value in values.items()},
            "features": self.features.name,
            "num_reference": len(self.reference),
        }
