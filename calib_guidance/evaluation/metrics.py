"""The metric table: how each metric is named and printed, what it needs, and how it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import ClassifierFeatures
from calib_guidance.evaluation.loading import load_object
from calib_guidance.evaluation.sample_set import Estimate, Measures, ReferenceHolds, SampleSet
from calib_guidance.metrics.bootstrap import bootstrap_sums
from calib_guidance.metrics.calibration import bin_cells, calibration_error_from_bins
from calib_guidance.metrics.classwise import classwise_distances
from calib_guidance.metrics.density_coverage import count_in_balls
from calib_guidance.metrics.frechet import (
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.precision_recall import inside_each_other

_SPLITS, _SUBSETS, _SUBSET_SIZE, _NEIGHBOURS, _BINS, _POINTS = 10, 100, 1000, 5, 15, 15
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


def _full_rank(width: Callable[[Measures], int]) -> Callable[[Measures, ReferenceHolds, int], str | None]:
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


def _at_least(samples: Callable[[Measures], int], images: Callable[[Measures], int]) -> Callable[..., str | None]:
    def enough(measures: Measures, reference: ReferenceHolds, n: int) -> str | None:
        m, fewest, fewest_images = reference.num_features, samples(measures), images(measures)
        if n >= fewest and m >= fewest_images:
            return None
        return f"needs {fewest} samples and {fewest_images} reference images or more, got {n} and {m}"

    return enough


def _splits(measures: Measures, reference: ReferenceHolds, n: int) -> str | None:
    return f"{n} samples cannot be parted into {_SPLITS} splits" if n < _SPLITS else None


# What is computed


def _strata(labels: Tensor) -> tuple[Tensor | None, str]:
    """Classes within which samples are drawn, where they are as good as equally many, and what a std is over then."""
    count = labels.unique(return_counts=True)[1]
    if len(count) > 1 and int(count.max()) - int(count.min()) <= 1 and int(labels.min()) >= 0:
        return labels, "samples within their classes, which are balanced; delta method, the reference fixed"
    return None, "samples, delta method, the reference fixed"


def _frechet(samples: SampleSet, column: str) -> Estimate:
    mean, covariance, root = samples.reference_moments(column)
    rows = samples.rows[column]
    strata, of = _strata(samples.labels)
    distance = frechet_distance(mean, covariance, *mean_and_covariance(rows), root)
    return Estimate(distance, frechet_distance_std((mean, covariance), rows, root, strata), of)


def _frechet_distance(samples: SampleSet) -> Estimate:
    counts = [c for c in (samples.num_samples, samples.reference.num_images) if c is not None]
    if note := sample_count_note(min(counts), samples.features.shape[1]):
        samples.notes.append(f"Fréchet distance: {note}")
    return _frechet(samples, "features")


def _frechet_distance_infinite(samples: SampleSet) -> Estimate | None:
    if not samples.measures.extrapolate:
        return None
    n, width = samples.features.shape
    # A tenth as in the paper; where that is not well above the width, the distance is no straight line in 1/N down there.
    smallest = n // 10 if n // 10 > 2 * width else 5 * width
    if smallest >= n:
        samples.notes.append(f"no extrapolation: subsets of {smallest} samples and more cannot be drawn from {n}")
        return None
    mean, covariance, _ = samples.reference_moments("features")
    line = extrapolated_frechet_distance((mean, covariance), samples.features, smallest, _POINTS)
    x = 1 / line.sizes
    residual = line.distances - line.value - line.slope * x
    variance = residual.square().sum() / (_POINTS - 2)
    std = (variance * (1 / _POINTS + x.mean().square() / (x - x.mean()).square().sum())).sqrt()
    if line.value < 0:
        samples.notes.append("Fréchet distance at N → ∞: below 0, too few samples for a straight line")
    return Estimate(line.value, std, f"straight line in 1/N through {_POINTS} subsets of {smallest} to {n} samples")


def _inception_score(samples: SampleSet) -> Estimate:
    splits = inception_score(samples.rows["logits"], _SPLITS)
    if isinstance(samples.measures.extractor, ClassifierFeatures):
        samples.notes.append(
            "Inception score: with the evaluation classifier's classes in place of Inception's, like no published one"
        )
    return Estimate(splits.mean(), splits.std(correction=0), f"one of {_SPLITS} splits")


def _kernel_subsets(samples: SampleSet) -> tuple[Tensor, str]:
    def draw() -> tuple[Tensor, str]:
        reference, generated = samples.reference_features, samples.features
        size = min(_SUBSET_SIZE, min(len(reference), len(generated)) // 2)
        subsets = kernel_distance_subsets(reference, generated, _SUBSETS, size)
        return subsets, f"one of {_SUBSETS} subsets of {size}"

    return samples.once("kernel subsets", draw)


def _kernel_distance(samples: SampleSet) -> Estimate:
    subsets, of = _kernel_subsets(samples)
    return Estimate(kernel_distance(samples.reference_features, samples.features), subsets.std(correction=0), of)


def _kernel_distance_mean(samples: SampleSet) -> Estimate:
    subsets, of = _kernel_subsets(samples)
    return Estimate(subsets.mean(), subsets.std(correction=0), of)


def _inside(samples: SampleSet) -> tuple[Tensor, Tensor]:
    k = samples.measures.k
    return samples.once("inside", lambda: inside_each_other(samples.reference_features, samples.features, k))


def _balls(samples: SampleSet) -> tuple[Tensor, Tensor]:
    return samples.once("balls", lambda: count_in_balls(samples.reference_features, samples.features, _NEIGHBOURS))


def _by_class(samples: SampleSet) -> dict[str, Any]:
    """Metrics of each class with enough images, and a note on those without."""
    known = samples.labels >= 0
    labels = samples.reference.labels.to(samples.labels.device)
    found = classwise_distances(
        samples.reference_features, labels, samples.features[known], samples.labels[known], samples.measures.k
    )
    reasons: dict[tuple[str, str], list[str]] = {}
    for label, values in found.items():
        for name, reason in values["skipped"].items():
            reasons.setdefault((name, reason), []).append(label)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, reason), classes in reasons.items():
        alike.setdefault((reason, tuple(classes)), []).append(METRICS[name].label)
    for (reason, classes), names in alike.items():
        listed = f"classes {', '.join(classes[:10])}{' …' if len(classes) > 10 else ''} of {len(found)}"
        which = f"all {len(found)} classes" if len(classes) == len(found) else listed
        samples.notes.append(f"{' and '.join(names)} by class skipped for {which}: {reason}")
    if "predicted" in samples.rows:
        for label, values in found.items():
            correct = samples.correct[samples.labels == int(label)]
            values["classifier_accuracy"] = float(correct.mean())
            values["std"]["classifier_accuracy"] = float(correct.std(correction=0) / len(correct) ** 0.5)
    return found


def _classifier_ece(samples: SampleSet) -> Estimate:
    cells = bin_cells(samples.rows["confidence"], samples.correct, _BINS)
    draws = calibration_error_from_bins(bootstrap_sums(cells.flatten(1), samples.resamples).view(-1, _BINS, 3))
    of = f"bootstrap over samples, {samples.resamples} draws"
    return Estimate(calibration_error_from_bins(cells.sum(0)), draws.std(), of)


_REFERENCE, _FRACTION, _ANY = "reference images, the samples fixed", (0.0, 1.0), (-math.inf, math.inf)
_POOL = {"needs": ("features",), "enough": _full_rank(lambda measures: measures.extractor.width)}
_BOTH = ("features", "reference_features")
_KID = {"format": "{:.4f}", "higher_is_better": False, "needs": _BOTH, "limits": _ANY, "option": "kid"}
_KID |= {"enough": _at_least(lambda measures: 4, lambda measures: 4)}
_PR = {"higher_is_better": True, "needs": _BOTH, "limits": _FRACTION, "option": "pr"}
_PR |= {"enough": _at_least(lambda measures: measures.k + 1, lambda measures: measures.k + 1)}
_DC = {"higher_is_better": True, "needs": _BOTH, "option": "dc"}
_DC |= {"enough": _at_least(lambda measures: 1, lambda measures: _NEIGHBOURS + 1)}
_OF_CLASSIFIER = {"needs": ("predictions", "labels"), "limits": _FRACTION, "option": "classifier"}

METRICS: Mapping[str, MetricSpec] = {
    spec.key: spec
    for spec in (
        MetricSpec(
            "frechet_distance",
            "Fréchet distance",
            higher_is_better=False,
            compute=_frechet_distance,
            option="fid",
            help="Fréchet distance of pooled features",
            **_POOL,
        ),
        MetricSpec(
            "frechet_distance_infinite",
            "Fréchet distance at N → ∞",
            higher_is_better=False,
            compute=_frechet_distance_infinite,
            limits=_ANY,
            option="fid",
            **_POOL,
        ),
        MetricSpec(
            "spatial_frechet_distance",
            "spatial Fréchet distance",
            higher_is_better=False,
            needs=("spatial",),
            compute=lambda samples: _frechet(samples, "spatial"),
            option="sfid",
            help="Fréchet distance of spatial features (ADM's sFID)",
            enough=_full_rank(lambda measures: measures.extractor.spatial_width),
        ),
        MetricSpec(
            "inception_score",
            "Inception score",
            higher_is_better=True,
            needs=("logits",),
            compute=_inception_score,
            limits=(1.0, math.inf),
            option="is",
            help=f"Inception score, {_SPLITS} splits",
            enough=_splits,
            by_default=lambda measures: not measures.extractor_classifies,
        ),
        MetricSpec(
            "kernel_distance",
            "kernel distance",
            compute=_kernel_distance,
            help=f"kernel distance (KID), {_SUBSETS} subsets",
            **_KID,
        ),
        MetricSpec("kernel_distance_mean", "kernel distance, mean of subsets", compute=_kernel_distance_mean, **_KID),
        MetricSpec(
            "precision",
            "precision",
            compute=lambda samples: samples.mean(_inside(samples)[0], "samples", fraction=True),
            help="improved precision and recall",
            **_PR,
        ),
        MetricSpec("recall", "recall", compute=lambda s: s.mean(_inside(s)[1], _REFERENCE, fraction=True), **_PR),
        MetricSpec(
            "density",
            "density",
            compute=lambda samples: samples.mean(_balls(samples)[0], "samples", scale=1 / _NEIGHBOURS),
            help=f"density and coverage, k = {_NEIGHBOURS}",
            **_DC,
        ),
        MetricSpec(
            "coverage",
            "coverage",
            compute=lambda samples: samples.mean(_balls(samples)[1] > 0, _REFERENCE, fraction=True),
            limits=_FRACTION,
            **_DC,
        ),
        MetricSpec(
            "by_class",
            "metrics of each class",
            needs=("features", "reference_features", "reference_labels", "labels"),
            compute=_by_class,
            option="classwise",
            help="fid, pr and dc of each class with enough images",
        ),
        MetricSpec(
            "classifier_accuracy",
            "accuracy",
            higher_is_better=True,
            compute=lambda samples: samples.mean(samples.correct, "samples", fraction=True),
            help="accuracy and ECE of the evaluation classifier on the samples",
            **_OF_CLASSIFIER,
        ),
        MetricSpec(
            "classifier_ece", "classifier ECE", higher_is_better=False, compute=_classifier_ece, **_OF_CLASSIFIER
        ),
        MetricSpec(
            "clip_score",
            "CLIP score",
            "{:.4f}",
            higher_is_better=True,
            needs=("similarity", "labels"),
            compute=lambda samples: samples.mean(samples.rows["similarity"], "samples"),
            limits=(-1.0, 1.0),
            option="clip",
            help="mean cosine similarity between sample and prompt",
            measured_by="TrajectoryCLIPScore",
        ),
        MetricSpec(
            "integral_ece",
            "integral ECE",
            higher_is_better=False,
            limits=_FRACTION,
            measured_by="TrajectoryCalibration",
        ),
        MetricSpec(
            "seconds_per_image", "seconds per image", "{:.4f}", higher_is_better=False, measured_by="SampleWriter"
        ),
    )
}
OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(spec.option for spec in METRICS.values() if spec.compute))


def load_metric(path: str) -> MetricSpec:
    """The spec at a dotted path, ``MODULE.NAME``: a :class:`MetricSpec`, or what makes one without arguments.

    Raises:
        ConfigurationError: there is none, or its key is taken.
    """
    module, _, name = path.rpartition(".")
    spec = load_object(module, name, f"metrics: {path}", "the dotted path of a MetricSpec")
    try:
        spec = spec() if callable(spec) else spec
    except TypeError as error:
        raise ConfigurationError(f"metrics: {path}: {error}; expected a MetricSpec, or what makes one") from error
    if not isinstance(spec, MetricSpec) or spec.compute is None:
        raise ConfigurationError(f"metrics: {path} is {type(spec).__name__}; expected a MetricSpec with compute")
    if spec.key in METRICS:
        raise ConfigurationError(f"metrics: {path} has the key {spec.key!r}, which a built-in metric has; rename it")
    return spec


def select(names: Iterable[str]) -> dict[str, tuple[MetricSpec, ...]]:
    """The metrics of each name, in the order of the table: names of :data:`OPTIONS`, or dotted paths of your own specs.

    Raises:
        ConfigurationError: an unknown name.
    """
    names = list(dict.fromkeys(names))
    if unknown := sorted(name for name in names if name not in OPTIONS and "." not in name):
        raise ConfigurationError(
            f"metrics: unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}, and the dotted path of a MetricSpec"
        )
    found = {
        option: tuple(spec for spec in METRICS.values() if spec.option == option and spec.compute)
        for option in OPTIONS
        if option in names
    }
    return found | {name: (load_metric(name),) for name in names if name not in OPTIONS}


def needs(names: Iterable[str]) -> set[str]:
    """Names of :data:`NEEDS` of any of the metrics."""
    return {need for specs in select(names).values() for spec in specs for need in spec.needs}


def applicable(measures: Measures, reference: ReferenceHolds) -> tuple[str, ...]:
    """Options whose needs are met and that are computed by default, whatever the number of samples."""
    return tuple(
        option
        for option, specs in select(OPTIONS).items()
        if specs[0].by_default(measures) and specs[0].unmet(measures, reference, None) is None
    )


def unmet(measures: Measures, reference: ReferenceHolds, num_samples: int, labels_known: bool = True) -> dict[str, str]:
    """Which of the metrics of ``measures`` cannot be computed, and why; see :meth:`MetricSpec.unmet`."""
    found = {
        name: specs[0].unmet(measures, reference, num_samples, labels_known)
        for name, specs in select(measures.metrics).items()
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def help_text() -> str:
    """A line for each option, for ``--help``."""
    helps: dict[str, str] = {}
    for spec in METRICS.values():
        if spec.compute and spec.help:
            helps.setdefault(spec.option, spec.help)
    return "".join(f"  {option:<11}{helps[option]}\n" for option in OPTIONS)


def described_specs(specs: Iterable[MetricSpec]) -> dict[str, dict[str, Any]]:
    """What readers of ``metrics.json`` need to know of metrics that are not in the table; see :func:`specs_of`."""
    return {
        spec.key: {"label": spec.label, "format": spec.format, "higher_is_better": spec.higher_is_better}
        for spec in specs
        if spec.key not in METRICS
    }


def specs_of(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """The table, and the specs of your own that the contents of ``metrics.json`` describe, by key."""
    own = {key: MetricSpec(key, **each) for results in measured for key, each in results.get("own_metrics", {}).items()}
    return {**METRICS, **own}
