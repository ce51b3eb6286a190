"""Measuring sets of samples against one reference, for ``SampleQuality`` and ``calib-guidance evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import from_uint8
from calib_guidance.data.image_sets import ImageBatch, ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS, unmet
from calib_guidance.evaluation.spec import Estimate, Measures, MetricSpec, ReferenceHolds, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics, gather_in_order, open_reference
from calib_guidance.runs.store import hash_state

_COLOR = {1: "gray", 3: "RGB"}


def check_shape(name: str, shape: Sequence[int], reference: str, reference_shape: Sequence[int] | None) -> None:
    """Refuse samples ``(C, H, W)`` of another size or mode than the reference's images, None where those are not known."""
    if reference_shape is None or tuple(reference_shape) == tuple(shape):
        return
    (channels, *size), (c, *s) = shape, reference_shape
    words = [f"{'×'.join(map(str, pixels))} {_COLOR[count]}" for count, pixels in ((channels, size), (c, s))]
    cure = "--size N resizes and crops both" if size != s else "--mode RGB or --mode L makes both alike"
    raise ConfigurationError(
        f"{name} has images {words[0]}, the reference {reference} {words[1]}: they cannot be compared. Take a reference like "
        f"the samples; in evaluate {cure}, where they are images"
    )


class Quality:
    """Measures sets of samples against one reference.

    Args:
        specs: the metrics.
        measures: what they are computed with; moved to the device of the process.
        reference: what :meth:`ReferenceStatistics.of` takes; what the metrics need of it is measured here.
        batch_size: images at a time.
        processes: that share the images.
        shapes: ``(C, H, W)`` of the samples by name, which are compared with the reference's, and which extractor, evaluation
            classifier and CLIP model must be able to take.
    """

    def __init__(
        self,
        specs: Sequence[MetricSpec],
        measures: Measures,
        reference: str | ImageSet | ReferenceStatistics,
        batch_size: int,
        processes: DistributedContext,
        shapes: Mapping[str, tuple[int, int, int]],
    ):
        self.specs, self.batch_size, self.processes = specs, batch_size, processes
        reference = open_reference(reference) if isinstance(reference, str) else reference
        for name, shape in shapes.items():
            check_shape(name, shape, reference.name, reference.image_shape)
        kept = ImageSet(reference.images) if getattr(reference, "images", None) else None
        self._images = reference if isinstance(reference, ImageSet) else kept
        self._provenance: dict[str, Any] = {"features": measures.extractor.provenance()}
        for name, classifier in (("eval_classifier", measures.eval_classifier), ("clip", measures.clip)):
            if classifier is not None:  # its hash before it is frozen, which may fold weights into others
                known = {"class": type(classifier).__name__, "weights_sha256": hash_state(classifier)}
                self._provenance[name] = getattr(classifier, "provenance", {}) | known
        self.measures = measures.to(processes.device)
        for shape in dict.fromkeys(shapes.values()):
            measures.check(shape, processes.device)
        needs = {need for spec in specs for need in spec.needs}
        self.reference = ReferenceStatistics.of(
            reference,
            measures.extractor,
            batch_size=batch_size,
            keep_features="reference_features" in needs,
            spatial="spatial" in needs,
            processes=processes,
        ).to(processes.device)
        self._provenance["reference"] = self.reference.provenance

    @torch.no_grad()
    def measure(self, images: ImageSet, progress: bool = False) -> dict[str, Any]:
        """Every metric of the samples; the same on all processes, which must all call it. The first shows ``progress``.

        Returns:
            The content of ``metrics.json``: values by key, ``by_class``, ``uncertainty`` by key (see
            :meth:`MetricSpec.uncertainty`), ``notes``, ``provenance``, counts, and ``own_metrics`` that are not in the table.
        """
        holds, processes = ReferenceHolds.of(self.reference), self.processes
        reasons = unmet(self.specs, self.measures, holds, images.num_images, images.labelled)
        specs = [spec for spec in self.specs if spec.option not in reasons]
        self._needs = {need for spec in specs for need in spec.needs}
        rows = []
        with tqdm(
            total=images.num_images,
            desc=images.name,
            unit="image",
            leave=False,
            disable=not (progress and processes.is_first),
        ) as bar:
            for batch in images.batches(self.batch_size, processes.rank, processes.world_size):
                rows.append(self._rows(batch))
                bar.update(len(batch.index) * processes.world_size)
        images.gather(processes)
        self._found = {name: value.to(processes.device) for name, value in gather_in_order(rows, processes).items()}
        notes = [f"{option} skipped: {reason}" for option, reason in reasons.items()]
        samples = SampleSet(self.measures, self.reference, self._found, notes=notes)
        own = {
            spec.key: {"label": spec.label, "format": spec.format, "higher_is_better": spec.higher_is_better}
            for spec in specs
            if spec.key not in METRICS
        }
        return {
            **_values(specs, samples),
            "notes": [*samples.notes, *self.reference.notes],
            "features": self.measures.extractor.name,
            "num_measured": samples.num_samples,
            "num_reference": self.reference.num_images,
            "provenance": self._provenance | {"samples": images.provenance()},
            **({"own_metrics": own} if own else {}),
        }

    def _rows(self, batch: ImageBatch) -> dict[str, Tensor]:
        """What is kept of a batch, see :class:`SampleSet`."""
        images, labels = (value.to(self.processes.device) for value in (batch.image, batch.label))
        pool, spatial, logits = self.measures.extractor(images)
        rows = {"index": batch.index.to(labels), "label": labels}
        for name, value in (("features", pool), ("spatial", spatial), ("logits", logits)):
            if name in self._needs:
                rows[name] = value.float()
        if "predictions" in self._needs:
            if self.measures.eval_classifier is not None:
                logits = self.measures.eval_classifier(from_uint8(images))
            p = logits.double().softmax(1)
            rows["of_label"] = _of_label(p, labels, "the evaluation classifier")
            rows["confidence"], rows["predicted"] = p.max(1)
        if "similarity" in self._needs:
            rows["similarity"] = _of_label(self.measures.similarity(images).float(), labels, "the CLIP model")
        return rows

    def predictions(self) -> dict[str, np.ndarray] | None:
        """Evaluation classifier's prediction for each sample of the last set, for ``predictions.npz``; None without one.

        ``index``, ``label``, ``predicted`` int64 and ``confidence`` float32, the probability that it gives the sample's class.
        """
        if "predictions" not in self._needs:
            return None
        found = {name: self._found[name].cpu().numpy() for name in ("index", "label", "predicted")}
        return found | {"confidence": self._found["of_label"].float().cpu().numpy()}

    def real_images(self, classes: int = 10, count: int = 10) -> dict[str, np.ndarray] | None:
        """Reference images of the first classes of the last set, for a report; None where the reference has none.

        ``label`` int64, ``name`` of the class (empty where it has none) and ``image`` uint8 ``(N, C, H, W)``, about 8 MB at most.
        """
        if self._images is None or not self._images.labelled:
            return None
        labels = self._found["label"].tolist()
        chosen = list(dict.fromkeys(label for label in labels if label >= 0))[:classes]
        count = max(1, min(count, 2**23 // (len(chosen) * math.prod(self._images.image_shape)))) if chosen else 0
        found = [(label, each) for label, some in self._images.examples(chosen, count).items() for each in some]
        if not found:
            return None
        label, image = zip(*found, strict=True)
        names = self._images.source.class_names
        return {
            "label": np.array(label),
            "name": np.array(["" if names is None else names[each] for each in label]),
            "image": np.stack(image),
        }


def _values(specs: Sequence[MetricSpec], samples: SampleSet) -> dict[str, Any]:
    """Values by key, and their ``uncertainty``."""
    found: dict[str, Any] = {}
    uncertainty: dict[str, dict[str, Any]] = {}
    for spec in specs:
        value = spec.compute(samples)
        if isinstance(value, Mapping):
            found[spec.key] = value
        elif value is not None:
            estimate = value if isinstance(value, Estimate) else Estimate(value)
            found[spec.key] = float(estimate.value)
            if math.isfinite(estimate.std):
                uncertainty[spec.key] = spec.uncertainty(*estimate)
    return {**found, "uncertainty": uncertainty}


def _of_label(values: Tensor, labels: Tensor, whose: str) -> Tensor:
    """Of values ``(N, K)`` those of the labels, ``(N,)``."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < values.shape[1]:
        raise ConfigurationError(
            f"the samples are of classes {int(labels.min())} … {int(labels.max())}, {whose} knows {values.shape[1]}, from 0 on"
        )
    return values.gather(1, labels[:, None]).squeeze(1)
