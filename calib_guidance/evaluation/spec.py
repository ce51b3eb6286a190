"""What a metric is (:class:`MetricSpec`), and what it is computed from (:class:`SampleSet`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError, first_line
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.statistics import ReferenceStatistics

T = TypeVar("T")

NO_FEATURES = (
    "the reference holds no features of single images, only their statistics: give images, or make it with calib-guidance "
    "reference --keep-features"
)
NEEDS = ("features", "spatial", "logits", "predictions", "similarity", "labels")  # of samples
NEEDS += ("reference_features", "reference_labels")
_95 = 1.959964  # standard deviations


class Estimate(NamedTuple):
    """Value of a metric.

    Attributes:
        value: scalar.
        std: standard deviation of the value; NaN where it is not known.
        of: what that is over, such as "one of 10 splits".
    """

    value: Tensor | float
    std: Tensor | float = math.nan
    of: str = ""


class ReferenceHolds(NamedTuple):
    """What there is of a reference, known before its features are.

    Attributes:
        num_images: that mean and covariance are of; None where that is not known.
        num_features: images whose features are kept or can be extracted; None where none are.
        spatial: whether there are statistics of spatial features.
        labels: whether the classes of the images are known.
    """

    num_images: int | None
    num_features: int | None
    spatial: bool
    labels: bool

    @classmethod
    def of(cls, reference: ReferenceStatistics | ImageSet) -> ReferenceHolds:
        if isinstance(reference, ImageSet):
            return cls(reference.num_images, reference.num_images, True, reference.labelled)
        kept = None if reference.features is None else len(reference.features)
        labels = reference.labels is not None
        if kept is None and reference.images is not None:
            batch = ImageSet(reference.images)
            kept, labels = batch.num_images, batch.labelled
        return cls(reference.num_images, kept, reference.spatial_mean is not None, labels)


class Measures(NamedTuple):
    """What metrics are computed with.

    Attributes:
        extractor: of the features.
        eval_classifier: predicts the samples' classes; None takes that of the extractor where it is
            :class:`ClassifierFeatures`.
        clip: with one prompt for each class.
        k: neighbors for precision and recall.
        full_rank: Fréchet distances only of more samples than features.
        extrapolate: also the Fréchet distance at infinitely many samples.
    """

    extractor: FeatureExtractor
    eval_classifier: Classifier | None = None
    clip: CLIPClassifier | None = None
    k: int = 3
    full_rank: bool = False
    extrapolate: bool = False

    @property
    def extractor_classifies(self) -> bool:
        return self.eval_classifier is None and isinstance(self.extractor, ClassifierFeatures)

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
        seen = {"the features": lambda: self.extractor(blank).pool}
        if self.eval_classifier is not None:
            seen["the evaluation classifier"] = lambda: self.eval_classifier(from_uint8(blank))
        if self.clip is not None:
            seen["the CLIP model"] = lambda: self.similarity(blank)
        for whose, see in seen.items():
            try:
                shape = tuple(see().shape)
            except (RuntimeError, ValueError) as error:
                size = "×".join(map(str, image_shape))
                raise ConfigurationError(
                    f"{whose} cannot be taken of images {size} (channels, height, width): {first_line(error)}"
                ) from error
            if whose == "the features" and shape != (2, self.extractor.width):
                raise ConfigurationError(
                    f"{self.extractor.name} says that its features are {self.extractor.width} wide, and gives {shape[1:]}"
                )

    def similarity(self, images: Tensor) -> Tensor:
        """Cosine between uint8 images ``(N, 3, H, W)`` and the CLIP model's prompts, ``(N, K)``."""
        self.clip.check_image(tuple(images.shape[1:]))
        return self.clip.similarity(from_uint8(images))

    def missing(self, reference: ReferenceHolds, labels_known: bool = True) -> dict[str, str]:
        """Why needs of metrics cannot be met, by their name in :data:`NEEDS`."""
        name, reasons = self.extractor.name, {}
        if self.extractor.spatial_width is None:
            reasons["spatial"] = f"{name} has no spatial features; Inception has"
        elif not reference.spatial:
            reasons["spatial"] = "the reference has no statistics of spatial features (mu_s, sigma_s)"
        if self.extractor.num_logits is None:
            reasons["logits"] = f"{name} names no classes; Inception does"
        if reference.num_features is None:
            reasons["reference_features"] = NO_FEATURES
        if not reference.labels:
            reasons["reference_labels"] = "the reference's images have no classes"
        if self.eval_classifier is None and not self.extractor_classifies:
            reasons["predictions"] = "there is no evaluation classifier (--eval-classifier CLASSIFIER.yaml)"
        if self.clip is None:
            reasons["similarity"] = "there is no CLIP model (--clip CLIP.yaml)"
        if not labels_known:
            reasons["labels"] = "the samples' classes are not known"
        return reasons


@dataclass
class SampleSet:
    """A complete set of samples, that metrics are computed from.

    Attributes:
        measures: the settings.
        reference: statistics of the reference, on the device.
        rows: by name, a value of each of the N samples in order of their index, on the device: ``index`` and ``label``
            (−1 where not known) always, and as needed ``features`` ``(N, D)``, ``spatial`` ``(N, D_s)``, ``logits``
            ``(N, K)`` of the extractor; ``predicted``, ``confidence`` and ``of_label`` (its probability of the label) of the
            evaluation classifier; ``similarity`` to the prompt of the label.
        notes: for readers of the metrics; metrics append to it.
    """

    measures: Measures
    reference: ReferenceStatistics
    rows: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
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

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed for the first of the metrics that share it."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def mean(self, values: Tensor, of: str, fraction: bool = False, scale: float = 1) -> Estimate:
        """Mean of values ``(N,)`` and its standard deviation, std/√N.

        Args:
            values: of samples, or of reference images.
            of: which of them.
            fraction: values are 0 or 1. Where all are equal, there is no deviation; 1/N is reported.
            scale: multiplies the values.
        """
        values, n = values.double() * scale, len(values)
        if n and fraction and float(values.mean()) in (0, 1):
            return Estimate(values.mean(), 1 / n, f"no difference among {n:,} {of}: 1/{n:,}")
        return Estimate(values.mean(), values.std(correction=0) / n**0.5, of)


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
        needs: of :data:`NEEDS`: the columns of :class:`SampleSet` that ``compute`` reads, and what the reference holds.
        compute: the :class:`Estimate` of a :class:`SampleSet`, or a mapping of several values, or None where there is nothing to
            report. A spec without it is measured by a callback.
        limits: smallest and largest possible value, which bound the confidence interval.
        option: name in ``--metrics``, shared by metrics that are computed together; the key by default.
        extractor: kind of the features that it is of (``FeatureExtractor.kind``), None for any.
        fewest: samples and reference images that it needs.
        measured_by: callback that writes it into ``metrics.json`` during ``predict``.

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

    def __post_init__(self):
        if unknown := set(self.needs) - set(NEEDS):
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

    def uncertainty(self, value: Tensor | float, std: Tensor | float, of: str) -> dict[str, Any]:
        """Uncertainty of a value for ``metrics.json``: ``std``, ``low``, ``high`` (95 %, normal) and ``of``, what it is over."""
        value, std = float(value), float(std)
        least, most = self.limits
        return {"std": std, "low": max(least, value - _95 * std), "high": min(most, value + _95 * std), "of": of}
