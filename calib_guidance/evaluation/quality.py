"""Measuring sets of samples against one reference, for ``SampleQuality`` and ``calib-guidance evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_guidance.backend.images import from_uint8
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import state_sha256
from calib_guidance.evaluation.sample_set import Estimate, Measures, ReferenceHolds, SampleSet
from calib_guidance.evaluation.selection import described_specs, select, unmet
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics.base import KeptRows


class Quality:
    """Measures sets of samples against one reference.

    :meth:`begin` a set, :meth:`update` with its images, on several processes with a share each, and :meth:`compute`.

    Args:
        measures: what to compute; moved to ``device``.
        reference: statistics of the reference's features, of the same extractor.
        resamples: draws of the bootstrap.
        device: of images and values.
    """

    def __init__(
        self,
        measures: Measures,
        reference: ReferenceStatistics,
        resamples: int = 200,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.reference, self.resamples = reference, resamples
        self._provenance = {"features": measures.extractor.provenance(), "reference": reference.provenance}
        for name, classifier in (("eval_classifier", measures.eval_classifier), ("clip", measures.clip)):
            if classifier is not None:  # its hash before it is frozen, which may fold weights into others
                known = {"class": type(classifier).__name__, "weights_sha256": state_sha256(classifier)}
                self._provenance[name] = getattr(classifier, "provenance", {}) | known
        self.measures, self.extractor = measures.to(self.device), measures.extractor
        self._reference_features = None if reference.features is None else reference.features.to(self.device)
        self._roots: dict[str, Tensor] = {}

    def begin(self, num_samples: int, labels_known: bool = True) -> None:
        """Forget all samples and begin a set.

        Args:
            num_samples: in the set.
            labels_known: whether the samples' classes are.
        """
        reasons = unmet(self.measures, ReferenceHolds.of(self.reference), num_samples, labels_known)
        self._skipped = [f"{name} skipped: {reason}" for name, reason in reasons.items()]
        chosen = select(self.measures.metrics)
        self._specs = [spec for name, specs in chosen.items() if name not in reasons for spec in specs]
        self._needs = {need for spec in self._specs for need in spec.needs}
        of_samples = torch.zeros(0, dtype=torch.float64)
        label = torch.zeros(0, dtype=torch.long)
        columns = {
            "features": lambda: {"features": torch.zeros(0, self.extractor.width)},
            "spatial": lambda: {"spatial": torch.zeros(0, self.extractor.spatial_width)},
            "logits": lambda: {"logits": torch.zeros(0, self.extractor.num_logits)},
            "predictions": lambda: {"predicted": label, "confidence": of_samples, "of_label": of_samples},
            "similarity": lambda: {"similarity": torch.zeros(0)},
        }
        kept = {"label": label}
        for need, empty in columns.items():
            if need in self._needs:
                kept |= empty()
        self._rows = KeptRows(kept).to(self.device)

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        """Add samples.

        Args:
            images: uint8 ``(N, C, H, W)``.
            labels: ``(N,)`` classes, −1 where not known.
            index: ``(N,)`` their numbers.

        Raises:
            ConfigurationError: classes that the evaluation classifier or the CLIP model does not have.
        """
        images, labels = images.to(self.device), labels.to(self.device)
        pool, spatial, logits = self.extractor(images)
        rows = {"label": labels, "index": index, "features": pool, "spatial": spatial, "logits": logits}
        if "predictions" in self._needs:
            if self.measures.eval_classifier is not None:
                logits = self.measures.eval_classifier(from_uint8(images))
            p = logits.double().softmax(1)
            _check_labels(labels, p.shape[1], "the evaluation classifier")
            rows["confidence"], rows["predicted"] = p.max(1)
            rows["of_label"] = p.gather(1, labels[:, None]).squeeze(1)
        if "similarity" in self._needs:
            similarity = self.measures.similarity(images)
            _check_labels(labels, similarity.shape[1], "the CLIP model")
            rows["similarity"] = similarity.gather(1, labels[:, None]).squeeze(1)
        self._rows.update(**rows)

    @torch.no_grad()
    def compute(self) -> dict[str, Any]:
        """Every metric of the set; the same on all processes, all of which must call it.

        Returns:
            Values by key of the metric, ``by_class``, and ``uncertainty`` by key: ``std``, ``low`` and ``high`` (95 %,
            normal) and ``of``, what it is over; ``notes``; ``provenance`` of features, reference, evaluation classifier and CLIP
            model; ``num_measured``, ``num_reference``, ``features``, and ``own_metrics``, which describes those that are not
            in the metric table.
        """
        self._set = SampleSet(
            self.measures,
            self.reference,
            self._rows.rows(),
            self._reference_features,
            self.resamples,
            self._roots,
            list(self._skipped),
        )
        found: dict[str, Any] = {}
        uncertainty: dict[str, dict[str, Any]] = {}
        for spec in self._specs:
            value = spec.compute(self._set)
            if isinstance(value, Mapping):
                found[spec.key] = value
            elif value is not None:
                estimate = value if isinstance(value, Estimate) else Estimate(value)
                found[spec.key] = float(estimate.value)
                if math.isfinite(estimate.std):
                    uncertainty[spec.key] = spec.uncertainty(*estimate)
        own = described_specs(self._specs)
        return {
            **found,
            "uncertainty": uncertainty,
            "notes": [*self._set.notes, *self.reference.notes],
            "features": self.extractor.name,
            "num_measured": self._set.num_samples,
            "num_reference": self.reference.num_images,
            "provenance": dict(self._provenance),
            **({"own_metrics": own} if own else {}),
        }

    def predictions(self) -> dict[str, np.ndarray] | None:
        """Evaluation classifier's prediction for each sample of :meth:`compute`, for ``predictions.npz``; None without one.

        ``index``, ``label``, ``predicted`` int64 and ``confidence`` float32, the probability that it gives the sample's class.
        """
        if "predictions" not in self._needs:
            return None
        rows = self._set.rows
        found = {name: rows[name].cpu().numpy() for name in ("index", "label", "predicted")}
        return found | {"confidence": rows["of_label"].float().cpu().numpy()}


def _check_labels(labels: Tensor, num_classes: int, whose: str) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ConfigurationError(
            f"the samples are of classes {int(labels.min())} … {int(labels.max())}, {whose} knows {num_classes}, from 0 on"
        )
