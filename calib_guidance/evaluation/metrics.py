"""The metric table: every metric of a set of samples, under one key, label and option; and metrics of a user's own module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.loading import load_object
from calib_guidance.evaluation.spec import Estimate, Measures, MetricSpec, ReferenceHolds, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics.bootstrap import bootstrap_sums
from calib_guidance.metrics.calibration import bin_cells, calibration_error_from_bins
from calib_guidance.metrics.frechet import (
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score, inception_score_adm
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.neighbors import count_in_balls

_SPLITS, _BLOCK, _SUBSETS, _SUBSET_SIZE, _NEIGHBORS, _BINS, _POINTS, _DRAWS = 10, 5000, 100, 1000, 5, 15, 15, 200
_REFERENCE = "reference images, the samples fixed"


def _strata(labels: Tensor) -> tuple[Tensor | None, str]:
    """Classes within which samples are drawn, where they are as good as equally many, and what a std is over then."""
    count = labels.unique(return_counts=True)[1]
    if len(count) > 1 and int(count.max()) - int(count.min()) <= 1 and int(labels.min()) >= 0:
        return labels, "samples within their classes, which are balanced; delta method, the reference fixed"
    return None, "samples, delta method, the reference fixed"


def _frechet(samples: SampleSet, column: str) -> Estimate:
    mean, covariance, root = samples.reference.moments(column)
    rows = samples.rows[column]
    strata, of = _strata(samples.labels)
    distance = frechet_distance(mean, covariance, *mean_and_covariance(rows), root)
    return Estimate(distance, frechet_distance_std((mean, covariance), rows, root, strata), of)


def _frechet_distance(samples: SampleSet) -> Estimate:
    counts = [c for c in (samples.num_samples, samples.reference.num_images) if c is not None]
    if note := sample_count_note(min(counts), samples.features.shape[1]):
        samples.notes.append(f"{_FID[samples.measures.extractor.kind][1]}: {note}")
    return _frechet(samples, "features")


def _frechet_distance_infinite(samples: SampleSet) -> Estimate | None:
    if not samples.measures.extrapolate:
        return None
    n, width = samples.features.shape
    # A tenth as in the paper; where that is not well above the width, the distance is not linear in 1/N there.
    smallest = n // 10 if n // 10 > 2 * width else 5 * width
    if smallest >= n:
        samples.notes.append(f"no extrapolation: subsets of {smallest} samples and more cannot be drawn from {n}")
        return None
    mean, covariance, _ = samples.reference.moments("features")
    line = extrapolated_frechet_distance((mean, covariance), samples.features, smallest, _POINTS)
    if line.value < 0:
        label = _FID[samples.measures.extractor.kind][1]
        samples.notes.append(f"{label} at N → ∞: below 0, too few samples for a straight line")
    return Estimate(
        line.value, line.std, f"straight line in 1/N through {_POINTS} subsets of {smallest} to {n} samples"
    )


def _inception_score(samples: SampleSet) -> Estimate:
    splits = inception_score(samples.rows["logits"], _SPLITS)
    if isinstance(samples.measures.extractor, ClassifierFeatures):
        samples.notes.append(
            "Inception score: with the evaluation classifier's classes in place of Inception's, like no published one"
        )
    return Estimate(splits.mean(), splits.std(correction=0), f"one of {_SPLITS} splits")


def _inception_score_adm(samples: SampleSet) -> Estimate:
    blocks = inception_score_adm(samples.rows["logits"], _BLOCK)
    std = blocks.std(correction=0) if len(blocks) > 1 else math.nan
    return Estimate(blocks.mean(), std, f"one of {len(blocks)} blocks of {_BLOCK:,}")


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


def _precision(samples: SampleSet, half: bool = False) -> Estimate:
    inside = count_in_balls(samples.reference_features, samples.features, samples.measures.k, half)[0] > 0
    return samples.mean(inside, "samples", fraction=True)


def _recall(samples: SampleSet, half: bool = False) -> Estimate:
    inside = count_in_balls(samples.features, samples.reference_features, samples.measures.k, half)[0] > 0
    return samples.mean(inside, _REFERENCE, fraction=True)


def _balls(samples: SampleSet) -> tuple[Tensor, Tensor]:
    return samples.once("balls", lambda: count_in_balls(samples.reference_features, samples.features, _NEIGHBORS))


def _density(samples: SampleSet) -> Estimate:
    return samples.mean(_balls(samples)[0], "samples", scale=1 / _NEIGHBORS)


def _coverage(samples: SampleSet) -> Estimate:
    return samples.mean(_balls(samples)[1] > 0, _REFERENCE, fraction=True)


def _accuracy(samples: SampleSet) -> Estimate:
    return samples.mean(samples.correct, "samples", fraction=True)


def _classifier_ece(samples: SampleSet) -> Estimate:
    cells = bin_cells(samples.rows["confidence"], samples.correct, _BINS)
    draws = calibration_error_from_bins(bootstrap_sums(cells.flatten(1), _DRAWS).view(-1, _BINS, 3))
    return Estimate(calibration_error_from_bins(cells.sum(0)), draws.std(), f"bootstrap over samples, {_DRAWS} draws")


def _of_class(samples: SampleSet, label: int) -> SampleSet:
    """The samples of a class against the reference images of it."""
    rows = {name: values[samples.labels == label] for name, values in samples.rows.items()}
    real = samples.reference_features[samples.reference.labels == label]
    enough = min(len(real), len(rows["index"])) > 2 * real.shape[1]
    moments = mean_and_covariance(real) if enough else (torch.empty(0), torch.empty(0, 0))
    return SampleSet(samples.measures, ReferenceStatistics(*moments, features=real, num_images=len(real)), rows)


def _by_class(samples: SampleSet) -> dict[str, dict[str, Any]]:
    """Metrics of each class with enough images, in the smaller set: a Fréchet distance is mostly bias below 2·D + 1, and the
    radii of balls are mostly chance below 10 samples a neighbor.

    By class, its number as text: ``num_samples``, ``num_reference``, the metrics, ``std`` of each, and ``skipped``, why
    one is missing.
    """
    measures, found = samples.measures, {}
    least = {
        _FID[measures.extractor.kind][0]: (2 * samples.features.shape[1] + 1, f"{samples.features.shape[1]} features"),
        **dict.fromkeys(("precision", "recall"), (10 * measures.k, f"k = {measures.k}")),
        **dict.fromkeys(("density", "coverage"), (10 * _NEIGHBORS, f"k = {_NEIGHBORS}")),
    }
    if "predicted" in samples.rows:
        least["classifier_accuracy"] = (0, "")
    missing: dict[tuple[int, str], dict[str, list[str]]] = {}
    for label in samples.labels[samples.labels >= 0].unique().tolist():
        part = _of_class(samples, label)
        few = min(part.num_samples, part.reference.num_images)
        values: dict[str, Any] = {"num_samples": part.num_samples, "num_reference": part.reference.num_images}
        std, skipped = {}, {}
        for key, (fewest, why) in least.items():
            if few < fewest:
                skipped[key] = f"{few} images in the smaller set; {fewest} are needed for {why}"
                missing.setdefault((fewest, why), {}).setdefault(METRICS[key].label, []).append(str(label))
                continue
            estimate = METRICS[key].compute(part)
            values[key], std[key] = float(estimate.value), float(estimate.std)
        found[str(label)] = values | {"std": std, "skipped": skipped}
    for (fewest, why), classes_of in missing.items():
        classes = next(iter(classes_of.values()))
        which = f"classes {', '.join(classes[:10])}{' …' if len(classes) > 10 else ''} of {len(found)}"
        if len(classes) == len(found):
            which = f"all {len(found)} classes"
        need = f"{fewest} images in both sets are needed for {why}"
        samples.notes.append(f"{' and '.join(classes_of)} by class skipped for {which}: {need}")
    return found


_FRACTION, _ANY = (0.0, 1.0), (-math.inf, math.inf)
_LOW, _HIGH = {"higher_is_better": False}, {"higher_is_better": True}
_BOTH = {"needs": ("features", "reference_features")}
_PR = {"limits": _FRACTION, "fewest": lambda measures: (measures.k + 1, measures.k + 1), **_BOTH, **_HIGH}
_DC = {"option": "dc", "fewest": lambda measures: (1, _NEIGHBORS + 1), **_BOTH, **_HIGH}
_IS = {"needs": ("logits",), "limits": (1.0, math.inf), **_HIGH}
_CLASSIFIER = {"option": "classifier", "needs": ("predictions", "labels"), "limits": _FRACTION}

# Key and label of a distance by the kind of features: the field's names are those of Inception's (and DINOv2's) only.
_FID = {"inception": ("fid", "FID"), "dinov2": ("fd_dinov2", "FD-DINOv2"), "": ("fd", "Fréchet distance")}
_SFID = {"inception": ("sfid", "sFID"), "": ("sfd", "spatial Fréchet distance")}
_KID = {"inception": ("kid", "KID"), "dinov2": ("kd_dinov2", "KD-DINOv2"), "": ("kd", "kernel distance")}


def _distance(names: Mapping[str, tuple[str, str]], end: str, label_end: str, **options: Any) -> Iterator[MetricSpec]:
    """A distance under its name with each kind of features, with an end of key and label."""
    for kind, (key, label) in names.items():
        yield MetricSpec(key + end, label + label_end, higher_is_better=False, extractor=kind, **options)


def _full_rank(width: Callable[[FeatureExtractor], int]) -> Callable[[Measures], tuple[int, int]]:
    """A Fréchet distance needs two samples, or more of them than features."""
    return lambda measures: (width(measures.extractor) + 1 if measures.full_rank else 2,) * 2


_FD = {"option": "fid", "needs": ("features",), "fewest": _full_rank(lambda extractor: extractor.width)}
_SFD = {"option": "sfid", "needs": ("spatial",), "fewest": _full_rank(lambda extractor: extractor.spatial_width)}
_KD = {"option": "kid", "format": "{:.4f}", "limits": _ANY, "fewest": lambda measures: (4, 4), **_BOTH}

METRICS: Mapping[str, MetricSpec] = {
    spec.key: spec
    for spec in (
        *_distance(_FID, "", "", compute=_frechet_distance, **_FD),
        *_distance(_FID, "_infinite", " at N → ∞", compute=_frechet_distance_infinite, limits=_ANY, **_FD),
        *_distance(_SFID, "", "", compute=lambda samples: _frechet(samples, "spatial"), **_SFD),
        MetricSpec(
            "inception_score",
            f"Inception score, {_SPLITS} shuffled splits",
            compute=_inception_score,
            option="is",
            fewest=lambda measures: (_SPLITS, 0),
            **_IS,
        ),
        MetricSpec(
            "inception_score_adm",
            f"Inception score, ADM's blocks of {_BLOCK:,}",
            compute=_inception_score_adm,
            option="is_adm",
            **_IS,
        ),
        *_distance(_KID, "", "", compute=_kernel_distance, **_KD),
        *_distance(_KID, "_mean", ", mean of subsets", compute=_kernel_distance_mean, **_KD),
        MetricSpec("precision", "precision", compute=_precision, option="pr", **_PR),
        MetricSpec("recall", "recall", compute=_recall, option="pr", **_PR),
        MetricSpec(
            "precision_adm",
            "precision, ADM's float16",
            compute=lambda samples: _precision(samples, half=True),
            option="pr_adm",
            **_PR,
        ),
        MetricSpec(
            "recall_adm",
            "recall, ADM's float16",
            compute=lambda samples: _recall(samples, half=True),
            option="pr_adm",
            **_PR,
        ),
        MetricSpec("density", "density", compute=_density, **_DC),
        MetricSpec("coverage", "coverage", compute=_coverage, **_DC | {"limits": _FRACTION}),
        MetricSpec(
            "by_class",
            "metrics of each class",
            needs=("features", "reference_features", "reference_labels", "labels"),
            compute=_by_class,
            option="classwise",
        ),
        MetricSpec("classifier_accuracy", "accuracy", compute=_accuracy, **_CLASSIFIER | _HIGH),
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
    "is": f"Inception score, mean of {_SPLITS} shuffled splits (as torch-fidelity)",
    "is_adm": f"Inception score as ADM's evaluator: mean of blocks of {_BLOCK:,}, not shuffled",
    "kid": f"kernel distance (KID with Inception), {_SUBSETS} subsets",
    "pr": "improved precision and recall, distances in float64",
    "pr_adm": "improved precision and recall as ADM's evaluator: distances in float16",
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

    But for ADM's conventions, and the Inception score of an evaluation classifier's classes, like no published one.
    """
    missing = measures.missing(reference)
    options = [name for name in OPTIONS if not name.endswith("_adm")]
    if measures.extractor_classifies:
        options.remove("is")
    return tuple(spec for spec in select(options, measures.extractor) if missing.keys().isdisjoint(spec.needs))


def unmet(
    specs: Iterable[MetricSpec], measures: Measures, reference: ReferenceHolds, num_samples: int, labels_known: bool
) -> dict[str, str]:
    """Options that cannot be computed of so many samples, whose classes are known or not, and why."""
    missing, reasons = measures.missing(reference, labels_known), {}
    for spec in specs:
        reason = next((missing[need] for need in spec.needs if need in missing), None)
        if reason is None:
            samples, images = spec.fewest(measures)
            of_features = "reference_features" in spec.needs
            held = reference.num_features if of_features else reference.num_images
            if num_samples < samples or (held is not None and held < images):
                reason = f"needs {samples} samples and {images} reference images or more, got {num_samples} and {held}"
                if spec.option in ("fid", "sfid") and measures.full_rank:
                    reason += "; --allow-few takes Fréchet distances of fewer, which compare only at the same number"
        if reason:
            reasons[spec.option] = reason
    return reasons


def specs_of(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """The table, and the specs of your own that the contents of ``metrics.json`` describe, by key."""
    own = {key: MetricSpec(key, **each) for results in measured for key, each in results.get("own_metrics", {}).items()}
    return {**METRICS, **own}
