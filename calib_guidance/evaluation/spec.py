"""What a metric is (:class:`MetricSpec`), and what it is computed from (:class:`SampleSet`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.errors import ConfigurationError, first_line
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.statistics import ReferenceStatistics

NO_FEATURES = (
    "the reference holds no features of single images, only their statistics: give images, or make it with calib-guidance "
    "reference --keep-features"
)
NO_CLASSIFIER = "there is no evaluation classifier (--eval-classifier CLASSIFIER.yaml)"
NEEDS = ("features", "spatial", "logits", "predictions", "similarity", "labels")  # of samples
NEEDS += ("reference_features", "reference_labels")
_95 = 1.959964  # standard deviations


class Estimate(NamedTuple):
    """Value of a metric.

    Examples:
        >>> Estimate(2.5, std=0.1).value, Estimate(2.5).std  # the second is not known
        (2.5, nan)
    """

    value: Tensor | float
    std: Tensor | float = math.nan  # not known
    of: str = ""  # what the standard deviation is over, such as "one of 10 splits"


class Measures(NamedTuple):
    """What metrics are computed with."""

    extractor: FeatureExtractor
    eval_classifier: Classifier | None = None  # None takes that of ClassifierFeatures
    clip: CLIPClassifier | None = None  # with one prompt for each class
    k: int = 3  # neighbors for precision and recall
    full_rank: bool = False  # Fréchet distances only of more samples than features
    extrapolate: bool = False  # also the Fréchet distance at infinitely many samples
    validation: ReferenceStatistics | None = None  # real images whose own distance is the unit of FDr

    @property
    def classifier(self) -> Classifier | None:
        """That predicts the samples' classes, if any does."""
        own = self.extractor.classifier if isinstance(self.extractor, ClassifierFeatures) else None
        return own if self.eval_classifier is None else self.eval_classifier

    def to(self, device: torch.device) -> Measures:
        """The same, frozen and on a device."""
        for part in (self.eval_classifier, self.clip):
            if part is not None:
                part.freeze().to(device)
        self.extractor.eval().to(device)
        return self

    @torch.no_grad()
    def check(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        """Raise ConfigurationError where extractor, evaluation classifier or CLIP model cannot take images ``(C, H, W)``."""
        blank = torch.zeros(2, *image_shape, dtype=torch.uint8, device=device)
        whose = "the features"
        try:
            shape = tuple(self.extractor(blank).pool.shape)
            if self.eval_classifier is not None:
                whose = "the evaluation classifier"
                self.eval_classifier(from_uint8(blank))
            if self.clip is not None:
                whose = "the CLIP model"
                self.similarity(blank)
        except (RuntimeError, ValueError) as error:
            images = f"images {'×'.join(map(str, image_shape))} (channels, height, width)"
            raise ConfigurationError(f"{whose} cannot be taken of {images}: {first_line(error)}") from error
        if shape != (2, width := self.extractor.width):
            raise ConfigurationError(
                f"{self.extractor.name}: its features are said to be {width} wide, not {shape[1:]}"
            )

    def similarity(self, images: Tensor) -> Tensor:
        """Cosine between uint8 images ``(N, 3, H, W)`` and the CLIP model's prompts, ``(N, K)``."""
        self.clip.check_image(tuple(images.shape[1:]))
        return self.clip.similarity(from_uint8(images))

    def missing(self, reference: ReferenceStatistics, labels_known: bool = True) -> dict[str, str]:
        """Why needs of metrics cannot be met, by their name in :data:`NEEDS`."""
        name = self.extractor.name
        reasons = {
            "spatial": ""
            if reference.has_spatial
            else "the reference has no statistics of spatial features (mu_s, sigma_s)",
            "logits": f"{name} names no classes; Inception does" if self.extractor.num_logits is None else "",
            "reference_features": NO_FEATURES if reference.num_features is None else "",
            "reference_labels": "" if reference.labelled else "the reference's images have no classes",
            "predictions": NO_CLASSIFIER if self.classifier is None else "",
            "similarity": "there is no CLIP model (--clip CLIP.yaml)" if self.clip is None else "",
            "labels": "" if labels_known else "the samples' classes are not known",
        }
        if self.extractor.spatial_width is None:
            reasons["spatial"] = f"{name} has no spatial features; Inception has"
        return {need: reason for need, reason in reasons.items() if reason}


@dataclass
class SampleSet:
    """A complete set of samples, that metrics are computed from.

    ``rows`` are by name values of the N samples in order of their index, on the device: ``index`` and ``label`` (−1 where
    not known), and as needed ``features`` ``(N, D)``, ``spatial`` ``(N, D_s)``, ``logits`` ``(N, K)`` of the extractor;
    ``predicted``, ``confidence`` and ``of_label`` (its probability of the label) of the evaluation classifier; ``similarity`` to
    the prompt of the label. Metrics append to ``notes``, which are for their readers.

    Examples:
        >>> rows = {"index": torch.arange(4), "label": torch.tensor([0, 1, 0, 1]), "predicted": torch.tensor([0, 1, 1, 1])}
        >>> samples = SampleSet(measures=None, reference=None, rows=rows)
        >>> float(samples.mean(samples.correct, "samples", fraction=True).value)
        0.75
    """

    measures: Measures
    reference: ReferenceStatistics
    rows: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    values_only: bool = False  # whether standard deviations, which take longer, are not needed
    processes: DistributedContext = field(default_factory=DistributedContext)  # which all have these rows
    _cache: dict[str, object] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.rows["index"])

    @property
    def labels(self) -> Tensor:
        return self.rows["label"]

    @property
    def features(self) -> Tensor:
        return self.rows["features"]

    @property
    def reference_features(self) -> Tensor:
        """``(M, D)``, of metrics that need ``reference_features``."""
        return self.reference.features

    @property
    def correct(self) -> Tensor:
        """1 where the evaluation classifier predicts the label, else 0, ``(N,)`` float64."""
        return (self.rows["predicted"] == self.labels).double()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, computed for the first of the metrics that share it."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def mean(self, values: Tensor, of: str, fraction: bool = False, scale: float = 1) -> Estimate:
        """Mean of ``scale`` times values ``(N,)`` of samples, or of what ``of`` says, and its standard deviation, std/√N.

        A ``fraction`` is of values 0 or 1. Where all are equal, there is no deviation; 1/N is reported.
        """
        values, n = values.double() * scale, len(values)
        if n and fraction and float(values.mean()) in (0, 1):
            return Estimate(values.mean(), 1 / n, f"no difference among {n:,} {of}: 1/{n:,}")
        return Estimate(values.mean(), values.std(correction=0) / n**0.5, of)


@dataclass(frozen=True)
class MetricSpec:
    """A metric; for one of your own give its dotted path, such as ``my_module.NEAREST``, where the names of metrics are listed
    (``metrics`` of :class:`~calib_guidance.callbacks.SampleQuality`, ``--metrics`` of ``calib-guidance evaluate``).

    Attributes:
        key, label, format: of the value in ``metrics.json``, and in tables, plots and reports.
        higher_is_better: None where neither is.
        needs: of :data:`NEEDS`: the columns of :class:`SampleSet` that ``compute`` reads, and what the reference holds.
        compute: the :class:`Estimate` of a :class:`SampleSet`, or a mapping of several values, or None where there is nothing to
            report. A spec without it is measured by a callback.
        limits: smallest and largest possible value, which bound the confidence interval.
        option: name in ``--metrics``, shared by metrics that are computed together; the key by default.
        extractor: kind of the features that it is of (``FeatureExtractor.kind``), None for any.
        fewest: samples and reference images that it needs.
        measured_by: callback that writes it into ``metrics.json`` during ``predict``.
        jackknife: whether ``compare-runs`` may take its error from values without some samples; false for random subsets.

    Example:
        >>> from calib_guidance.evaluation import METRICS
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
    extractor: str | None = None
    fewest: Callable[[Measures], tuple[int, int]] = lambda measures: (1, 0)
    measured_by: str = "SampleQuality"
    jackknife: bool = True

    def __post_init__(self):
        if unknown := set(self.needs) - set(NEEDS):
            raise ValueError(f"{self.key}: unknown needs {', '.join(sorted(unknown))}; known: {', '.join(NEEDS)}")
        if not self.option:
            object.__setattr__(self, "option", self.key)

    @property
    def title(self) -> str:
        """The label with the direction that is better."""
        return self.label + {None: "", True: " ↑", False: " ↓"}[self.higher_is_better]

    def text(self, value: float) -> str:
        """A value as tables show it."""
        text = self.format.format(value)
        return text.removeprefix("-") if float(text) == 0 else text  # rounding below zero

    def uncertainty(self, value: Tensor | float, std: Tensor | float, of: str) -> dict[str, Any]:
        """For ``metrics.json``: ``std``, ``low``, ``high`` (95 %, normal) and ``of``, what it is over."""
        value, std = float(value), float(std)
        least, most = self.limits
        return {"std": std, "low": max(least, value - _95 * std), "high": min(most, value + _95 * std), "of": of}
