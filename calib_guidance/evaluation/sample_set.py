"""What metrics are computed from: the settings, the reference, and the values of every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.errors import ConfigurationError, first_line
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics.bootstrap import bootstrap_sums
from calib_guidance.metrics.frechet import covariance_root

T = TypeVar("T")


class Estimate(NamedTuple):
    """Value of a metric.

    Attributes:
        value: scalar.
        std: standard deviation of the value; NaN where it is not known.
        of: what that is over, such as "bootstrap over samples, 200 draws".
    """

    value: Tensor | float
    std: Tensor | float = float("nan")
    of: str = ""


class ReferenceHolds(NamedTuple):
    """What there is of a reference, known before its features are.

    Attributes:
        num_images: that mean and covariance are of; None where that is not known.
        num_features: images whose features are kept; None where none are.
        spatial: whether there are statistics of spatial features.
        labels: whether the classes of the images are known.
    """

    num_images: int | None
    num_features: int | None
    spatial: bool
    labels: bool

    @classmethod
    def of(cls, reference: ReferenceStatistics) -> ReferenceHolds:
        kept = None if reference.features is None else len(reference.features)
        return cls(reference.num_images, kept, reference.spatial_mean is not None, reference.labels is not None)


class Measures(NamedTuple):
    """Which metrics are computed, and with what.

    Attributes:
        metrics: names of :data:`~calib_guidance.evaluation.selection.OPTIONS`, or dotted paths of metrics of your own.
        extractor: of the features.
        eval_classifier: predicts the samples' classes; None takes that of the extractor where it is
            :class:`ClassifierFeatures`.
        clip: with one prompt for each class.
        k: neighbours for precision and recall.
        full_rank: Fréchet distances only of more samples than features.
        extrapolate: also the Fréchet distance at infinitely many samples.
    """

    metrics: tuple[str, ...]
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

    def check(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        """Try everything that sees images on blank ones.

        Args:
            image_shape: ``(C, H, W)``.
            device: where it all is.

        Raises:
            ConfigurationError: images of another kind than the extractor, evaluation classifier or CLIP model takes.
        """
        blank = torch.zeros(2, *image_shape, dtype=torch.uint8, device=device)
        seen = {"the features": lambda: self.extractor(blank).pool}
        if self.eval_classifier is not None:
            seen["the evaluation classifier"] = lambda: self.eval_classifier(from_uint8(blank))
        if self.clip is not None:
            seen["the CLIP model"] = lambda: self.similarity(blank)
        for whose, see in seen.items():
            try:
                with torch.no_grad():
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


@dataclass
class SampleSet:
    """A complete set of samples, as :class:`~calib_guidance.evaluation.spec.MetricSpec` computes metrics from.

    Attributes:
        measures: the settings.
        reference: statistics of the reference.
        rows: by name, a value of each of the N samples in order of their index, on the device: ``index`` and ``label``
            (−1 where not known) always, and as needed ``features`` ``(N, D)``, ``spatial`` ``(N, D_s)``, ``logits``
            ``(N, K)`` of the extractor; ``predicted``, ``confidence`` and ``of_label`` (its probability of the label) of the
            evaluation classifier; ``similarity`` to the prompt of the label.
        reference_features: ``(M, D)`` on the device; None where they are not kept.
        resamples: draws of the bootstrap.
        roots: roots of the reference's covariances, kept from set to set.
        notes: for readers of the metrics; metrics append to it.
    """

    measures: Measures
    reference: ReferenceStatistics
    rows: dict[str, Tensor]
    reference_features: Tensor | None = None
    resamples: int = 200
    roots: dict[str, Tensor] = field(default_factory=dict)
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
    def correct(self) -> Tensor:
        """1 where the evaluation classifier predicts the label, else 0, ``(N,)`` float64."""
        return (self.rows["predicted"] == self.labels).double()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed for the first of the metrics that share it."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def reference_moments(self, column: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, covariance and its root of the reference's ``features`` or ``spatial`` features, float64 on the device."""
        of, device = self.reference, self.labels.device
        mean, covariance = (
            (of.mean, of.covariance) if column == "features" else (of.spatial_mean, of.spatial_covariance)
        )
        if column not in self.roots:
            self.roots[column] = covariance_root(covariance).to(device)
        return mean.double().to(device), covariance.double().to(device), self.roots[column]

    def mean(self, values: Tensor, of: str, fraction: bool = False, scale: float = 1) -> Estimate:
        """Mean of values ``(N,)``, and its standard deviation by bootstrap.

        Args:
            values: of samples, or of reference images.
            of: which of them.
            fraction: values are 0 or 1. Where all are equal, a bootstrap would have no deviation; 1/N is reported.
            scale: multiplies the values.
        """
        values = values.double()[:, None] * scale
        n = len(values)
        if n and fraction and float(values.mean()) in (0, 1):
            return Estimate(values.mean(), 1 / n, f"no difference among {n:,} {of}: 1/{n:,}")
        std = (bootstrap_sums(values, self.resamples) / n).std()
        return Estimate(values.mean(), std, f"bootstrap over {of}, {self.resamples} draws")
