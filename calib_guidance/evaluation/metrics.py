"""The metric table: every metric of a set of samples, under one key, label and option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calib_guidance.evaluation.features import ClassifierFeatures
from calib_guidance.evaluation.sample_set import Estimate, SampleSet
from calib_guidance.evaluation.spec import MetricSpec, at_least, full_rank
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
_POOL = {"needs": ("features",), "enough": full_rank(lambda measures: measures.extractor.width)}
_BOTH = ("features", "reference_features")
_KID = {"format": "{:.4f}", "higher_is_better": False, "needs": _BOTH, "limits": _ANY, "option": "kid"}
_KID |= {"enough": at_least(lambda measures: 4, lambda measures: 4)}
_PR = {"higher_is_better": True, "needs": _BOTH, "limits": _FRACTION, "option": "pr"}
_PR |= {"enough": at_least(lambda measures: measures.k + 1, lambda measures: measures.k + 1)}
_DC = {"higher_is_better": True, "needs": _BOTH, "option": "dc"}
_DC |= {"enough": at_least(lambda measures: 1, lambda measures: _NEIGHBOURS + 1)}
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
            enough=full_rank(lambda measures: measures.extractor.spatial_width),
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
            enough=lambda measures, reference, n: (
                f"{n} samples cannot be parted into {_SPLITS} splits" if n < _SPLITS else None
            ),
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
