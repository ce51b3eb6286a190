"""Metrics of the written samples against a reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import Uint8Rule, to_uint8
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.classifiers import Classifier
from calib_guidance.data.base import ImageSource, Row
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.evaluation import FeatureExtractor
from calib_guidance.evaluation.metrics import select
from calib_guidance.evaluation.output import write_arrays
from calib_guidance.evaluation.quality import Quality
from calib_guidance.evaluation.spec import Measures


class _DatasetImages(ImageSource):
    """Images of a data set of {image in [-1, 1], label}."""

    kind = "data set"

    def __init__(self, images: Dataset, uint8_rule: Uint8Rule):
        super().__init__(getattr(images, "name", type(images).__name__), len(images))
        self.images, self.uint8_rule, self.labelled = images, uint8_rule, "label" in images[0]

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        for block in blocks:
            items = [self.images[i] for i in block]
            yield [
                Row(
                    f"image {i}",
                    to_uint8(item["image"], self.uint8_rule).permute(1, 2, 0).cpu().numpy(),
                    int(item.get("label", -1)),
                )
                for i, item in zip(block, items, strict=True)
            ]

    def provenance(self) -> dict[str, Any]:
        return {"uint8_rule": self.uint8_rule}


class SampleQuality(Measurement):
    """Fréchet distance, precision and recall against reference images; accuracy and ECE of an evaluation classifier.

    Measured on the written images of the complete run folder; ranks share them out. The evaluation classifier's prediction for
    each sample is in ``predictions.npz`` beside ``metrics.json``. ``calib-guidance evaluate`` measures the same way.

    Args:
        features: the extractor, :class:`~calib_guidance.evaluation.ClassifierFeatures`,
            :class:`~calib_guidance.evaluation.InceptionFeatures` or another of :mod:`calib_guidance.evaluation.features`.
        reference: data set of {image in [-1, 1], label, index} that nothing was trained on, or a path: statistics that
            ``calib-guidance reference`` or another tool wrote, or images as it takes them.
        metrics: names of :data:`~calib_guidance.evaluation.metrics.OPTIONS`, or dotted paths of a
            :class:`~calib_guidance.evaluation.MetricSpec` of your own; those that the features, the reference or the number of
            samples do not allow are skipped with a note.
        eval_classifier: evaluation classifier; None uses that of :class:`~calib_guidance.evaluation.ClassifierFeatures`.
        k: neighbors for precision and recall.
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
        uint8_rule: Uint8Rule = "truncate",
        batch_size: int = 250,
    ):
        self.features, self.reference, self.metrics = features, reference, tuple(metrics)
        self.uint8_rule, self.batch_size = uint8_rule, batch_size
        self.measures = Measures(features, eval_classifier, k=k)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        processes = DistributedContext(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        classifies = self.measures.extractor_classifies or self.measures.eval_classifier
        specs = select((name for name in self.metrics if classifies or name != "classifier"), self.features)
        source = self.reference
        if not isinstance(source, str):
            source = ImageSet(_DatasetImages(source, self.uint8_rule), max_corrupt=0.0)
        denoiser = pl_module.denoiser
        with torch.no_grad():
            image = denoiser.decode(torch.zeros(1, *denoiser.image_shape, device=pl_module.device))
        shapes = {"the run": tuple(image.shape[1:])}
        self.quality = Quality(specs, self.measures, source, self.batch_size, processes, shapes)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        folder = self.context.store.extended()
        if not any(folder.record(shard)["rows"] for shard in folder.shards()):
            return {"notes": ["quality not measured: all samples failed"]}
        results = self.quality.measure(ImageSet(folder.path))
        # Folders are moved, and the same samples measure the same wherever they lie.
        results["provenance"]["samples"]["source"] = "this run"
        if trainer.is_global_zero:
            write_arrays(folder.path, self.quality)
        return results
