"""The metric table: every metric of a set of samples, under one key, label and option; and metrics of a user's own module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.loading import load_object
from calib_guidance.evaluation.spec import Estimate, Measures, MetricSpec, ReferenceHolds, SampleSet
from calib_guidance.metrics.bootstrap import bootstrap_sums
from calib_guidance.metrics.calibration import bin_cells, calibration_error_from_bins
from calib_guidance.metrics.classwise import classwise_distances
from calib_guidance.metrics.frechet import (
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.neighbors import count_in_balls, inside_each_other

_SPLITS, _SUBSETS, _SUBSET_SIZE, _NEIGHBORS, _BINS, _POINTS = 10, 100, 1000, 5, 15, 15


def _strata(labels: Tensor) -> tuple[Tensor | None, str]:
    """Classes within which samples are drawn, where they are as good as equally many, and what a std is over then."""
    count = labels.unique(return_counts=True)[1]
    if len(count) > 1 and int(count.max()) - int(count.min()) <= 1 and int(labels.min()) >= 0:
        return labels, "samples within their classes, which are balanced; delta method, the reference fixed"
    return None, "samples, delta method, the reference fixed"


def _name(samples: SampleSet, names: Mapping[str, tuple[str, str]]) -> str:
    """Label of a distance with the features that the samples have."""
    return names[samples.measures.extractor.kind][1]


def _frechet(samples: SampleSet, column: str) -> Estimate:
    mean, covariance, root = samples.reference.moments(column)
    rows = samples.rows[column]
    strata, of = _strata(samples.labels)
    distance = frechet_distance(mean, covariance, *mean_and_covariance(rows), root)
    return Estimate(distance, frechet_distance_std((mean, covariance), rows, root, strata), of)


def _frechet_distance(samples: SampleSet) -> Estimate:
    counts = [c for c in (samples.num_samples, samples.reference.num_images) if c is not None]
    if note := sample_count_note(min(counts), samples.features.shape[1]):
        samples.notes.append(f"{_name(samples, _FID)}: {note}")
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
    mean, covariance, _ = samples.reference.moments("features")
    line = extrapolated_frechet_distance((mean, covariance), samples.features, smallest, _POINTS)
    x = 1 / line.sizes
    residual = line.distances - line.value - line.slope * x
    variance = residual.square().sum() / (_POINTS - 2)
    std = (variance * (1 / _POINTS + x.mean().square() / (x - x.mean()).square().sum())).sqrt()
    if line.value < 0:
        samples.notes.append(f"{_name(samples, _FID)} at N → ∞: below 0, too few samples for a straight line")
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
    return samples.once("balls", lambda: count_in_balls(samples.reference_features, samples.features, _NEIGHBORS))


def _precision(samples: SampleSet) -> Estimate:
    return samples.mean(_inside(samples)[0], "samples", fraction=True)


def _recall(samples: SampleSet) -> Estimate:
    return samples.mean(_inside(samples)[1], _REFERENCE, fraction=True)


def _density(samples: SampleSet) -> Estimate:
    return samples.mean(_balls(samples)[0], "samples", scale=1 / _NEIGHBORS)


def _coverage(samples: SampleSet) -> Estimate:
    return samples.mean(_balls(samples)[1] > 0, _REFERENCE, fraction=True)


def _by_class(samples: SampleSet) -> dict[str, Any]:
    """Metrics of each class with enough images, and a note on those without."""
    known = samples.labels >= 0
    generated, labels = samples.features[known], samples.labels[known]
    found = classwise_distances(
        samples.reference_features, samples.reference.labels, generated, labels, samples.measures.k
    )
    fd = _FID[samples.measures.extractor.kind][0]
    for values in found.values():
        for each in (values, values["std"], values["skipped"]):
            if "fd" in each:
                each[fd] = each.pop("fd")
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


def _at_least(fewest: Callable[[Measures], tuple[int, int]]) -> Callable[[Measures, ReferenceHolds, int], str | None]:
    """So many samples, and reference images whose features are kept."""

    def enough(measures: Measures, reference: ReferenceHolds, n: int) -> str | None:
        m, (samples, images) = reference.num_features, fewest(measures)
        if n >= samples and m >= images:
            return None
        return f"needs {samples} samples and {images} reference images or more, got {n} and {m}"

    return enough


_REFERENCE, _FRACTION, _ANY = "reference images, the samples fixed", (0.0, 1.0), (-math.inf, math.inf)
_LOW, _HIGH = {"higher_is_better": False}, {"higher_is_better": True}
_BOTH = {"needs": ("features", "reference_features")}
_PR = {"option": "pr", "limits": _FRACTION, **_BOTH, **_HIGH}
_PR |= {"enough": _at_least(lambda measures: (measures.k + 1, measures.k + 1))}
_DC = {"option": "dc", "enough": _at_least(lambda measures: (1, _NEIGHBORS + 1)), **_BOTH, **_HIGH}
_CLASSIFIER = {"option": "classifier", "needs": ("predictions", "labels"), "limits": _FRACTION}

# Key and label of a distance by the kind of features: the field's names are those of Inception's (and DINOv2's) only.
_FID = {"inception": ("fid", "FID"), "dinov2": ("fd_dinov2", "FD-DINOv2"), "": ("fd", "Fréchet distance")}
_SFID = {"inception": ("sfid", "sFID"), "": ("sfd", "spatial Fréchet distance")}
_KID = {"inception": ("kid", "KID"), "dinov2": ("kd_dinov2", "KD-DINOv2"), "": ("kd", "kernel distance")}


def _distance(names: Mapping[str, tuple[str, str]], variants: Mapping[tuple[str, str], dict], **shared: Any):
    """Specs of a distance with each kind of features; ``variants``, by end of the key and of the label."""
    for kind, (key, label) in names.items():
        for (end, more), variant in variants.items():
            yield MetricSpec(key + end, label + more, higher_is_better=False, extractor=kind, **shared | variant)


METRICS: Mapping[str, MetricSpec] = {
    spec.key: spec
    for spec in (
        *_distance(
            _FID,
            {
                ("", ""): {"compute": _frechet_distance},
                ("_infinite", " at N → ∞"): {"compute": _frechet_distance_infinite, "limits": _ANY},
            },
            option="fid",
            needs=("features",),
            enough=_full_rank(lambda measures: measures.extractor.width),
        ),
        *_distance(
            _SFID,
            {("", ""): {"compute": lambda samples: _frechet(samples, "spatial")}},
            option="sfid",
            needs=("spatial",),
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
            enough=lambda measures, reference, n: (
                f"{n} samples cannot be parted into {_SPLITS} splits" if n < _SPLITS else None
            ),
        ),
        *_distance(
            _KID,
            {
                ("", ""): {"compute": _kernel_distance},
                ("_mean", ", mean of subsets"): {"compute": _kernel_distance_mean},
            },
            option="kid",
            format="{:.4f}",
            limits=_ANY,
            enough=_at_least(lambda measures: (4, 4)),
            **_BOTH,
        ),
        MetricSpec("precision", "precision", compute=_precision, **_PR),
        MetricSpec("recall", "recall", compute=_recall, **_PR),
        MetricSpec("density", "density", compute=_density, **_DC),
        MetricSpec("coverage", "coverage", compute=_coverage, **_DC | {"limits": _FRACTION}),
        MetricSpec(
            "by_class",
            "metrics of each class",
            needs=("features", "reference_features", "reference_labels", "labels"),
            compute=_by_class,
            option="classwise",
        ),
        MetricSpec(
            "classifier_accuracy",
            "accuracy",
            compute=lambda samples: samples.mean(samples.correct, "samples", fraction=True),
            **_CLASSIFIER | _HIGH,
        ),
        MetricSpec("classifier_ece", "classifier ECE", compute=_classifier_ece, **_CLASSIFIER | _LOW),
        MetricSpec(
            "clip_score",
            "CLIP score",
            "{:.4f}",
            higher_is_better=True,
            needs=("similarity", "labels"),
            compute=lambda samples: samples.mean(samples.rows["similarity"], "samples"),
            limits=(-1.0, 1.0),
            option="clip",
            measured_by="TrajectoryCLIPScore",
        ),
        MetricSpec("integral_ece", "integral ECE", limits=_FRACTION, measured_by="TrajectoryCalibration", **_LOW),
        MetricSpec("seconds_per_image", "seconds per image", "{:.4f}", measured_by="SampleWriter", **_LOW),
    )
}

OPTIONS: Mapping[str, str] = {
    "fid": "Fréchet distance of pooled features: FID with Inception, FD-DINOv2 with DINOv2",
    "sfid": "Fréchet distance of spatial features (ADM's sFID)",
    "is": f"Inception score, {_SPLITS} splits",
    "kid": f"kernel distance: KID with Inception; {_SUBSETS} subsets",
    "pr": "improved precision and recall",
    "dc": f"density and coverage, k = {_NEIGHBORS}",
    "classwise": "fid, pr and dc of each class with enough images",
    "classifier": "accuracy and ECE of the evaluation classifier on the samples",
    "clip": "mean cosine similarity between sample and prompt",
}


def _load_metric(path: str) -> MetricSpec:
    """The spec at a dotted path, ``MODULE.NAME``: a :class:`MetricSpec`, or what makes one without arguments."""
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
    return dataclasses.replace(spec, option=path)


def select(names: Iterable[str], extractor: FeatureExtractor) -> tuple[MetricSpec, ...]:
    """The metrics of names, in the order of the table: names of :data:`OPTIONS`, or dotted paths of your own specs."""
    names = list(dict.fromkeys(names))
    if unknown := sorted(name for name in names if name not in OPTIONS and "." not in name):
        raise ConfigurationError(
            f"metrics: unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}, and the dotted path of a MetricSpec"
        )
    kinds = (None, extractor.kind)
    known = (spec for spec in METRICS.values() if spec.option in names and spec.compute and spec.extractor in kinds)
    return *known, *(_load_metric(name) for name in names if name not in OPTIONS)


def select_applicable(measures: Measures, reference: ReferenceHolds) -> tuple[MetricSpec, ...]:
    """All metrics of the table whose needs are met, whatever the number of samples.

    But for the Inception score of an evaluation classifier's classes, like no published one.
    """
    missing = measures.missing(reference)
    options = [option for option in OPTIONS if not (option == "is" and measures.extractor_classifies)]
    return tuple(spec for spec in select(options, measures.extractor) if missing.keys().isdisjoint(spec.needs))


def unmet(
    specs: Iterable[MetricSpec], measures: Measures, reference: ReferenceHolds, num_samples: int, labels_known: bool
) -> dict[str, str]:
    """Options that cannot be computed of so many samples, whose classes are known or not, and why."""
    missing, reasons = measures.missing(reference, labels_known), {}
    for spec in specs:
        reason = next((missing[need] for need in spec.needs if need in missing), None)
        if reason := reason or spec.enough(measures, reference, num_samples):
            reasons[spec.option] = reason
    return reasons


def specs_of(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """The table, and the specs of your own that the contents of ``metrics.json`` describe, by key."""
    own = {key: MetricSpec(key, **each) for results in measured for key, each in results.get("own_metrics", {}).items()}
    return {**METRICS, **own}
