"""Metrics of the written samples against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.classifiers import Classifier
from calib_guidance.data.image_sets import open_images
from calib_guidance.evaluation import FeatureExtractor
from calib_guidance.evaluation.output import write_predictions
from calib_guidance.evaluation.quality import Quality
from calib_guidance.evaluation.sample_set import Measures
from calib_guidance.evaluation.selection import needs
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics import mean_and_covariance


class SampleQuality(Measurement):
    """Fréchet distance, precision and recall against reference images; accuracy and ECE of an evaluation classifier.

    Measured on the written images of the complete run folder; ranks share them out. The evaluation classifier's prediction for
    each sample is in ``predictions.npz`` beside ``metrics.json``. ``calib-guidance evaluate`` measures the same way.

    Args:
        features: the extractor, :class:`~calib_guidance.evaluation.ClassifierFeatures`,
            :class:`~calib_guidance.evaluation.InceptionFeatures` or another of :mod:`calib_guidance.evaluation.features`.
        reference: data set of {image in [-1, 1], label, index} that nothing was trained on, or a path: statistics that
            ``calib-guidance reference`` or another tool wrote, or images as it takes them.
        metrics: names of :data:`~calib_guidance.evaluation.selection.OPTIONS`, or dotted paths of a
            :class:`~calib_guidance.evaluation.MetricSpec` of your own; those that the features, the reference or the number of
            samples do not allow are skipped with a note.
        eval_classifier: evaluation classifier; None uses that of :class:`~calib_guidance.evaluation.ClassifierFeatures`.
        k: neighbours for precision and recall.
        uint8_rule: of a reference that is a data set, see :func:`calib_guidance.backend.images.to_uint8`.
        batch_size: images at a time.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Dataset | str,
        metrics: Sequence[str] = ("fid", "pr", "classifier"),
        eval_classifier: Classifier | None = None,
        k: int = 3,
        uint8_rule: str = "truncate",
        batch_size: int = 250,
    ):
        self.features, self.reference = features, reference
        self.uint8_rule, self.batch_size = uint8_rule, batch_size
        self.measures = Measures(tuple(metrics), features, eval_classifier, k=k)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        device = trainer.strategy.root_device
        self.processes = DistributedContext(trainer.global_rank, trainer.world_size, device)
        if isinstance(self.reference, str):
            extractor = self.features
            reference = ReferenceStatistics.of(
                self.reference, extractor, self.batch_size, True, processes=self.processes
            )
        else:
            reference = self._measure_reference(self.reference, device)
        if not (self.measures.extractor_classifies or self.measures.eval_classifier):
            self.measures = self.measures._replace(metrics=tuple(m for m in self.measures.metrics if m != "classifier"))
        self.quality = Quality(self.measures, reference, device=device)

    @torch.no_grad()
    def _measure_reference(self, images: Dataset, device: torch.device) -> ReferenceStatistics:
        self.features.eval().to(device)
        found, labels = [], []
        for batch in DataLoader(images, self.batch_size):
            found.append(self.features(to_uint8(batch["image"].to(device), self.uint8_rule)))
            labels.append(batch.get("label"))
        pool = torch.cat([features.pool for features in found])
        spatial = (None, None)
        if "spatial" in needs(self.measures.metrics) and self.features.spatial_width is not None:
            spatial = mean_and_covariance(torch.cat([features.spatial for features in found]))
        provenance = {
            "source": getattr(images, "name", type(images).__name__),
            "kind": "data set",
            "num_images": len(pool),
            "image_shape": list(batch["image"].shape[1:]),
            "uint8_rule": self.uint8_rule,
        }
        return ReferenceStatistics(
            *mean_and_covariance(pool),
            *spatial,
            features=pool.cpu(),
            labels=None if None in labels else torch.cat(labels),
            num_images=len(pool),
            provenance={"images": provenance, "features": self.features.provenance()},
        )

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        folder = self.context.store.extended()
        if not any(folder.record(shard)["rows"] for shard in folder.shards()):
            return {"notes": ["quality not measured: all samples failed"]}
        images = open_images(folder.path)
        self.quality.begin(images.num_images)
        for batch in images.batches(self.batch_size, self.processes.rank, self.processes.world_size):
            self.quality.update(*batch)
        images.gather(self.processes)
        results = self.quality.compute()
        # Folders are moved, and the same samples measure the same wherever they lie.
        results["provenance"]["samples"] = images.provenance() | {"source": "this run"}
        if trainer.is_global_zero and (predictions := self.quality.predictions()) is not None:
            write_predictions(Path(trainer.default_root_dir, "predictions.npz"), predictions)
        return results
