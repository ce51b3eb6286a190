"""Specification of a metric: its name, its format, what it needs, and how it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calib_guidance.evaluation.sample_set import Estimate, Measures, ReferenceHolds, SampleSet

NO_FEATURES = (
    "the reference holds no features of single images, only their statistics: give images, or make it with calib-guidance "
    "reference --keep-features"
)
_95 = 1.959964  # standard deviations


def _enough(measures: Measures, reference: ReferenceHolds, num_samples: int) -> str | None:
    return None


@dataclass(frozen=True)
class MetricSpec:
    """A metric: its name, its format, what it needs, and how it is computed.

    A spec of your own needs no registration: give its dotted path, such as ``my_module.NEAREST``, where the names of metrics
    are listed (``metrics`` of :class:`~calib_guidance.callbacks.SampleQuality`, ``--metrics`` of ``calib-guidance evaluate``).

    Attributes:
        key: of the value in ``metrics.json``.
        label: in tables, plots and reports.
        format: of the value in tables.
        higher_is_better: None where neither is.
        needs: names of :data:`NEEDS`: the columns of :class:`SampleSet` that ``compute`` reads, and what the reference holds.
        compute: the :class:`Estimate` of a :class:`SampleSet`, or a mapping of several values, or None where there is nothing to
            report. A spec without it is measured by a callback.
        limits: smallest and largest possible value, which bound the confidence interval.
        option: name in ``--metrics``, shared by metrics that are computed together; the key by default.
        help: what ``option`` computes, in a few words, said once for each option.
        enough: why so many samples are too few, else None.
        by_default: whether ``evaluate`` computes it without being asked, given that all needs are met.
        measured_by: callback that writes it into ``metrics.json`` during ``predict``.

    Example:
        >>> from calib_guidance.evaluation.metrics import METRICS
        >>> METRICS["precision"].title, METRICS["precision"].format.format(0.81234)
        ('precision ↑', '0.812')
    """

    key: str
    label: str
    format: str = "{:.3f}"
    higher_is_better: bool | None = None
    needs: tuple[str, ...] = ()
    compute: Callable[[SampleSet], Estimate | Mapping[str, Any] | None] | None = None
    limits: tuple[float, float] = (0.0, math.inf)
    option: str = ""
    help: str = ""
    enough: Callable[[Measures, ReferenceHolds, int], str | None] = _enough
    by_default: Callable[[Measures], bool] = lambda measures: True
    measured_by: str = "SampleQuality"

    def __post_init__(self):
        if unknown := set(self.needs) - NEEDS.keys():
            raise ValueError(f"{self.key}: unknown needs {', '.join(sorted(unknown))}; known: {', '.join(NEEDS)}")
        if not self.option:
            object.__setattr__(self, "option", self.key)

    @property
    def title(self) -> str:
        """The label with the direction that is better."""
        return self.label if self.higher_is_better is None else f"{self.label} {'↑' if self.higher_is_better else '↓'}"

    def text(self, value: float) -> str:
        """A value as tables show it."""
        text = self.format.format(value)
        return text.removeprefix("-") if float(text) == 0 else text  # rounding below zero

    def unmet(
        self, measures: Measures, reference: ReferenceHolds, num_samples: int | None, labels_known: bool = True
    ) -> str | None:
        """Why the metric cannot be computed, else None.

        Args:
            measures: what it would be computed with.
            reference: what the reference holds.
            num_samples: in the set; None leaves their number out of consideration.
            labels_known: whether the samples' classes are known.
        """
        for need in self.needs:
            if reason := NEEDS[need](measures, reference, labels_known):
                return reason
        return None if num_samples is None else self.enough(measures, reference, num_samples)

    def uncertainty(self, value: Tensor | float, std: Tensor | float, of: str) -> dict[str, Any]:
        """Uncertainty of a value for ``metrics.json``: ``std``, ``low``, ``high`` (95 %, normal) and ``of``, what it is over."""
        value, std = float(value), float(std)
        least, most = self.limits
        return {"std": std, "low": max(least, value - _95 * std), "high": min(most, value + _95 * std), "of": of}


NEEDS: Mapping[str, Callable[[Measures, ReferenceHolds, bool], str | None]] = {
    "features": lambda measures, reference, labels: None,
    "spatial": lambda measures, reference, labels: (
        f"{measures.extractor.name} has no spatial features; Inception has"
        if measures.extractor.spatial_width is None
        else None
        if reference.spatial
        else "the reference has no statistics of spatial features (mu_s, sigma_s)"
    ),
    "logits": lambda measures, reference, labels: (
        f"{measures.extractor.name} names no classes; Inception does" if measures.extractor.num_logits is None else None
    ),
    "reference_features": lambda measures, reference, labels: NO_FEATURES if reference.num_features is None else None,
    "reference_labels": lambda measures, reference, labels: (
        None if reference.labels else "the reference's images have no classes"
    ),
    "predictions": lambda measures, reference, labels: (
        None
        if measures.eval_classifier is not None or measures.extractor_classifies
        else "there is no evaluation classifier (--eval-classifier CLASSIFIER.yaml)"
    ),
    "similarity": lambda measures, reference, labels: (
        "there is no CLIP model (--clip CLIP.yaml)" if measures.clip is None else None
    ),
    "labels": lambda measures, reference, labels: None if labels else "the samples' classes are not known",
}


# Whether there are enough samples


def full_rank(width: Callable[[Measures], int]) -> Callable[[Measures, ReferenceHolds, int], str | None]:
    """A Fréchet distance needs two samples, or more of them than features."""

    def enough(measures: Measures, reference: ReferenceHolds, n: int) -> str | None:
        m, d = reference.num_images, width(measures)
        fewest = d + 1 if measures.full_rank else 2
        if n >= fewest and (m is None or m >= fewest):
            return None
        whose = f"{n} samples" if n < fewest else f"{m} images in the reference"
        if measures.full_rank:
            return (
                f"{whose} with {d} features each, whose covariance is singular: more than {d} are needed "
                "(--allow-few for distances that compare only at the same number)"
            )
        return f"{whose}: 2 are needed"

    return enough


def at_least(samples: Callable[[Measures], int], images: Callable[[Measures], int]) -> Callable[..., str | None]:
    def enough(measures: Measures, reference: ReferenceHolds, n: int) -> str | None:
        m, fewest, fewest_images = reference.num_features, samples(measures), images(measures)
        if n >= fewest and m >= fewest_images:
            return None
        return f"needs {fewest} samples and {fewest_images} reference images or more, got {n} and {m}"

    return enough
