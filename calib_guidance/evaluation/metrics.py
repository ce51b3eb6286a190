"""The metric table: every metric of a set of samples, under one key, label and option; and metrics of a user's own module."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from calib_guidance.backend.choices import BLOCK, METRIC_OPTIONS, NEIGHBORS, SPLITS, SUBSETS
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import ENCODERS, ClassifierFeatures, FeatureExtractor
from calib_guidance.evaluation.named import load_object
from calib_guidance.evaluation.spec import Estimate, Measures, MetricSpec, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics import frechet
from calib_guidance.metrics.calibration import bin_cells, calibration_error_from_bins
from calib_guidance.metrics.inception_score import inception_score, inception_score_adm
from calib_guidance.metrics.kernel_distance import clip_mmd, kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.moments import bootstrap_sums
from calib_guidance.metrics.neighbors import count_in_balls, in_balls
from calib_guidance.metrics.sliced import mind

_SUBSET_SIZE, _BINS, _POINTS, _DRAWS = 1000, 15, 15, 200
_REFERENCE = "reference images, the samples fixed"


def _frechet(samples: SampleSet, column: str = "features") -> Estimate:
    mean, covariance, root = samples.reference.moments(column)
    rows, labels, of = samples.rows[column], samples.labels, "samples, delta method, the reference fixed"
    images = min(filter(None, (samples.num_samples, samples.reference.num_images)))
    if column == "features" and (note := frechet.sample_count_note(images, rows.shape[1])):
        samples.notes.append(f"{_FID[samples.measures.extractor.kind][1]}: {note}")
    count = labels.unique(return_counts=True)[1]
    balanced = len(count) > 1 and int(count.max()) - int(count.min()) <= 1 and int(labels.min()) >= 0
    if balanced:
        of = "samples within their classes, which are balanced; delta method, the reference fixed"
    moments = frechet.mean_and_covariance(rows)
    distance = frechet.frechet_distance(mean, covariance, *moments, root)
    if samples.values_only:
        return Estimate(distance)
    std = frechet.frechet_distance_std((mean, covariance), rows, root, labels if balanced else None, moments)
    return Estimate(distance, std, of)


def _frechet_infinite(samples: SampleSet) -> Estimate | None:
    if not samples.measures.extrapolate:
        return None
    n, width = samples.features.shape
    # A tenth as in the paper; where that is not well above the width, the distance is not linear in 1/N there.
    smallest = n // 10 if n // 10 > 2 * width else 5 * width
    if smallest >= n:
        samples.notes.append(f"no extrapolation: subsets of {smallest} samples and more cannot be drawn from {n}")
        return None
    moments = samples.reference.moments("features")[:2]
    line = frechet.extrapolated_frechet_distance(moments, samples.features, smallest, _POINTS)
    if line.value < 0:
        label = _FID[samples.measures.extractor.kind][1]
        samples.notes.append(f"{label} at N → ∞: below 0, too few samples for a straight line")
    of = f"straight line in 1/N through {_POINTS} subsets of {smallest} to {n} samples"
    return Estimate(line.value, line.std, of)


def validation_distance(reference: ReferenceStatistics, held: ReferenceStatistics) -> Tensor:
    """Fréchet distance of real validation images to the reference, the unit of FDr."""
    mean, covariance, root = reference.moments("features")
    moments = (value.to(mean.device) for value in (held.mean, held.covariance))
    return frechet.frechet_distance(mean, covariance, *moments, root)


def _frechet_ratio(samples: SampleSet) -> Estimate | None:
    """FDr: the distance in units of that of real validation images to the same reference."""
    held = samples.measures.validation
    if held is None:
        return None
    unit = validation_distance(samples.reference, held)
    found, kind = _frechet(dataclasses.replace(samples, notes=[])), samples.measures.extractor.kind
    if not samples.values_only:
        published = f"; FD-loss divides by {ENCODERS[kind].unit:g} at ImageNet 256" if kind == "inception" else ""
        count = "an unknown number of" if held.num_images is None else f"{held.num_images:,}"
        samples.notes.append(f"FDr: divided by {float(unit):.4g}, the distance of {count} validation images{published}")
    return Estimate(found.value / unit, found.std / unit, f"{found.of}, and the validation images fixed")


def _mind(samples: SampleSet) -> Estimate:
    reference, generated = samples.reference_features, samples.features
    count = min(len(reference), len(generated))
    samples.notes.append(f"MIND: {count:,} images of both sets; biased upwards, comparable only at the same number")
    return Estimate(mind(reference, generated))


def _inception_score(samples: SampleSet) -> Estimate:
    splits = inception_score(samples.rows["logits"], SPLITS)
    if isinstance(samples.measures.extractor, ClassifierFeatures):
        note = "with the evaluation classifier's classes in place of Inception's, like no published one"
        samples.notes.append(f"Inception score: {note}")
    return Estimate(splits.mean(), splits.std(correction=0), f"one of {SPLITS} splits")


def _inception_score_adm(samples: SampleSet) -> Estimate:
    blocks = inception_score_adm(samples.rows["logits"], BLOCK)
    std = blocks.std(correction=0) if len(blocks) > 1 else math.nan
    return Estimate(blocks.mean(), std, f"one of {len(blocks)} blocks of {BLOCK:,}")


def _kernel(samples: SampleSet, mean_of_subsets: bool = False) -> Estimate:
    reference, generated = samples.reference_features, samples.features
    if samples.values_only:
        return Estimate(kernel_distance(reference, generated))
    size = min(_SUBSET_SIZE, min(len(reference), len(generated)) // 2)
    subsets = samples.once("kernel subsets", lambda: kernel_distance_subsets(reference, generated, SUBSETS, size))
    value = subsets.mean() if mean_of_subsets else kernel_distance(reference, generated)
    return Estimate(value, subsets.std(correction=0), f"one of {SUBSETS} subsets of {size}")


def _in_balls(samples: SampleSet, half: bool, recall: bool) -> Estimate:
    k = samples.measures.k
    sets = samples.reference_features, samples.features
    both = samples.once(f"in balls {half}", lambda: in_balls(*sets, k, half, samples.processes))
    return samples.mean(both[recall], _REFERENCE if recall else "samples", fraction=True)


def _balls(samples: SampleSet) -> tuple[Tensor, Tensor]:
    return samples.once("balls", lambda: count_in_balls(samples.reference_features, samples.features, NEIGHBORS))


def _classifier_ece(samples: SampleSet) -> Estimate:
    cells = bin_cells(samples.rows["confidence"], samples.correct, _BINS)
    if samples.values_only:
        return Estimate(calibration_error_from_bins(cells.sum(0)))
    draws = calibration_error_from_bins(bootstrap_sums(cells.flatten(1), _DRAWS).view(-1, _BINS, 3))
    return Estimate(calibration_error_from_bins(cells.sum(0)), draws.std(), f"bootstrap over samples, {_DRAWS} draws")


def _of_class(samples: SampleSet, label: int) -> SampleSet:
    """The samples of a class against the reference images of it."""
    rows = {name: values[samples.labels == label] for name, values in samples.rows.items()}
    real = samples.reference_features[samples.reference.labels == label]
    enough = min(len(real), len(rows["index"])) > 2 * real.shape[1]
    moments = frechet.mean_and_covariance(real) if enough else (torch.empty(0), torch.empty(0, 0))
    return SampleSet(samples.measures, ReferenceStatistics(*moments, features=real, num_images=len(real)), rows)


def _by_class(samples: SampleSet) -> dict[str, dict[str, Any]]:
    """By class number as text: ``num_samples``, ``num_reference``, metrics, ``std`` of each, ``skipped``, why one is missing.

    With few images in the smaller set a Fréchet distance is mostly bias (below 2·D + 1), the radii of balls mostly chance.
    """
    measures, width = samples.measures, samples.features.shape[1]
    groups = [
        ((_FID[measures.extractor.kind][0],), 2 * width + 1, f"{width} features"),
        (("precision", "recall"), 10 * measures.k, f"k = {measures.k}"),
        (("density", "coverage"), 10 * NEIGHBORS, f"k = {NEIGHBORS}"),
    ]
    if "predicted" in samples.rows:
        groups.append((("classifier_accuracy",), 0, ""))
    found, smaller = {}, {}
    for label in map(str, samples.labels[samples.labels >= 0].unique().tolist()):
        part = _of_class(samples, int(label))
        values = found[label] = {"num_samples": part.num_samples, "num_reference": part.reference.num_images}
        few = smaller[label] = min(values.values())
        values |= {"std": {}, "skipped": {}}
        for keys, fewest, why in groups:
            for key in keys:
                if few < fewest:
                    values["skipped"][key] = f"{few} images in the smaller set; {fewest} are needed for {why}"
                else:
                    estimate = METRICS[key].compute(part)
                    values[key], values["std"][key] = float(estimate.value), float(estimate.std)
    for keys, fewest, why in groups:
        if classes := [label for label, few in smaller.items() if few < fewest]:
            which = f"classes {', '.join(classes[:10])}{' …' if len(classes) > 10 else ''} of {len(found)}"
            samples.notes.append(
                f"{' and '.join(METRICS[key].label for key in keys)} by class skipped for "
                f"{f'all {len(found)} classes' if len(classes) == len(found) else which}: {fewest} images in both sets are "
                f"needed for {why}"
            )
    return found


_FRACTION, _ANY = (0.0, 1.0), (-math.inf, math.inf)
_LOW, _HIGH = {"higher_is_better": False}, {"higher_is_better": True}
_BOTH = {"needs": ("features", "reference_features")}
_PR = {"limits": _FRACTION, "fewest": lambda measures: (measures.k + 1, measures.k + 1), **_BOTH, **_HIGH}
_DC = {"option": "dc", "fewest": lambda measures: (1, NEIGHBORS + 1), **_BOTH, **_HIGH}
_IS = {"needs": ("logits",), "limits": (1.0, math.inf), "jackknife": False, **_HIGH}
_CLASSIFIER = {"option": "classifier", "needs": ("predictions", "labels"), "limits": _FRACTION}

# Key and label of a distance by the kind of features: the field's names are those of Inception's (and DINOv2's) only.
_FID = {"inception": ("fid", "FID"), "dinov2": ("fd_dinov2", "FD-DINOv2"), "": ("fd", "Fréchet distance")}
_SFID = {"inception": ("sfid", "sFID"), "": ("sfd", "spatial Fréchet distance")}
_KID = {"inception": ("kid", "KID"), "dinov2": ("kd_dinov2", "KD-DINOv2"), "": ("kd", "kernel distance")}
_MIND = {"inception": ("mind", "MIND"), "dinov2": ("mind_dinov2", "MIND-DINOv2"), "": ("sliced", "sliced distance")}
for _names, _start in ((_FID, "FD"), (_KID, "KD"), (_MIND, "MIND")):
    _names["clip"] = (f"{_start.lower()}_clip", f"{_start}-CLIP")
_FDR = {"inception": ("fdr", "FDr"), "dinov2": ("fdr_dinov2", "FDr-DINOv2"), "clip": ("fdr_clip", "FDr-CLIP")}
_FDR[""] = ("fd_ratio", "Fréchet distance over validation's")


def _distance(names: Mapping[str, tuple[str, str]], end: str, label_end: str, **options: Any) -> Iterator[MetricSpec]:
    """A distance under its name with each kind of features, with an end of key and label."""
    for kind, (key, label) in names.items():
        yield MetricSpec(key + end, label + label_end, higher_is_better=False, extractor=kind, **options)


def _mean(
    values: Callable[[SampleSet], Tensor], of: str = "samples", **options: Any
) -> Callable[[SampleSet], Estimate]:
    return lambda samples: samples.mean(values(samples), of, **options)


def _without_error(value: Callable[[SampleSet], Tensor]) -> Callable[[SampleSet], Estimate]:
    return lambda samples: Estimate(value(samples))


def _precision_recall(end: str, label_end: str, half: bool) -> Iterator[MetricSpec]:
    for name in ("precision", "recall"):
        compute = functools.partial(_in_balls, half=half, recall=name == "recall")
        yield MetricSpec(name + end, name + label_end, compute=compute, option=f"pr{end}", **_PR)


# A Fréchet distance needs two samples, or more of them than features.
_FD, _SFD = {"option": "fid", "needs": ("features",)}, {"option": "sfid", "needs": ("spatial",)}
_FD |= {"fewest": lambda measures: (measures.extractor.width + 1 if measures.full_rank else 2,) * 2}
_SFD |= {"fewest": lambda measures: (measures.extractor.spatial_width + 1 if measures.full_rank else 2,) * 2}
_KD = {"option": "kid", "format": "{:.4f}", "limits": _ANY, "fewest": lambda measures: (4, 4), **_BOTH}
_SCORE = {"fewest": lambda measures: (SPLITS, 0), "option": "is", **_IS}
_CLIP = {"option": "clip", "needs": ("similarity", "labels"), "limits": (-1.0, 1.0), **_HIGH}
_CLIP |= {"measured_by": "TrajectoryCLIPScore"}
_CLASSES = {"option": "classwise", "needs": ("features", "reference_features", "reference_labels", "labels")}


def _specs() -> Iterator[MetricSpec]:
    yield from _distance(_FID, "", "", compute=_frechet, **_FD)
    yield from _distance(_FID, "_infinite", " at N → ∞", compute=_frechet_infinite, limits=_ANY, jackknife=False, **_FD)
    yield from _distance(_FDR, "", "", compute=_frechet_ratio, **_FD | {"option": "fdr"})
    yield from _distance(_SFID, "", "", compute=lambda samples: _frechet(samples, "spatial"), **_SFD)
    label = f"Inception score, {SPLITS} shuffled splits"
    yield MetricSpec("inception_score", label, compute=_inception_score, **_SCORE)
    label = f"Inception score, ADM's blocks of {BLOCK:,}"
    yield MetricSpec("inception_score_adm", label, compute=_inception_score_adm, option="is_adm", **_IS)
    yield from _distance(_KID, "", "", compute=_kernel, **_KD)
    yield from _distance(
        _KID, "_mean", ", mean of subsets", compute=lambda samples: _kernel(samples, True), jackknife=False, **_KD
    )
    yield from _distance(_MIND, "", "", compute=_mind, jackknife=False, option="mind", **_BOTH)
    cmmd = _without_error(lambda s: clip_mmd(s.reference_features, s.features))
    yield MetricSpec("cmmd", "CMMD", compute=cmmd, option="cmmd", extractor="clip", **_BOTH, **_LOW)
    yield from _precision_recall("", "", half=False)
    yield from _precision_recall("_adm", ", ADM's float16", half=True)
    yield MetricSpec("density", "density", compute=_mean(lambda s: _balls(s)[0], scale=1 / NEIGHBORS), **_DC)
    coverage = _mean(lambda s: _balls(s)[1] > 0, _REFERENCE, fraction=True)
    yield MetricSpec("coverage", "coverage", compute=coverage, limits=_FRACTION, **_DC)
    yield MetricSpec("by_class", "metrics of each class", compute=_by_class, **_CLASSES)
    accuracy = _mean(lambda s: s.correct, fraction=True)
    yield MetricSpec("classifier_accuracy", "accuracy", compute=accuracy, **_CLASSIFIER, **_HIGH)
    yield MetricSpec("classifier_ece", "classifier ECE", compute=_classifier_ece, **_CLASSIFIER, **_LOW)
    yield MetricSpec("clip_score", "CLIP score", "{:.4f}", compute=_mean(lambda s: s.rows["similarity"]), **_CLIP)
    yield MetricSpec("integral_ece", "integral ECE", limits=_FRACTION, measured_by="TrajectoryCalibration", **_LOW)
    yield MetricSpec("seconds_per_image", "seconds per image", "{:.4f}", measured_by="SampleWriter", **_LOW)


METRICS: Mapping[str, MetricSpec] = {spec.key: spec for spec in _specs()}


def _load_metric(path: str) -> MetricSpec:
    """The spec at a dotted path: a :class:`MetricSpec`, or what makes one without arguments."""
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
    """The metrics of names, in the order of the table: names of :data:`METRIC_OPTIONS`, or dotted paths of your own specs."""
    names = list(dict.fromkeys(names))
    if unknown := sorted(name for name in names if name not in METRIC_OPTIONS and "." not in name):
        known = f"{', '.join(METRIC_OPTIONS)}, and the dotted path of a MetricSpec"
        raise ConfigurationError(f"metrics: unknown {', '.join(unknown)}; known: {known}")
    kinds = (None, extractor.kind)
    known = (spec for spec in METRICS.values() if spec.option in names and spec.compute and spec.extractor in kinds)
    return *known, *(_load_metric(name) for name in names if name not in METRIC_OPTIONS)


def unmet(
    specs: Iterable[MetricSpec], measures: Measures, reference: ReferenceStatistics, images: ImageSet
) -> dict[str, str]:
    """Options that cannot be computed of a set of images, and why."""
    missing, reasons = measures.missing(reference, images.labelled), {}
    for spec in specs:
        reason = next((missing[need] for need in spec.needs if need in missing), None)
        if reason is None:
            samples, least = spec.fewest(measures)
            held = reference.num_features if "reference_features" in spec.needs else reference.num_images
            if images.num_images < samples or (held is not None and held < least):
                reason = f"needs {samples} samples and {least} reference images or more, "
                reason += f"got {images.num_images} and {held}"
                if spec.option in ("fid", "sfid") and measures.full_rank:
                    reason += "; --allow-few takes Fréchet distances of fewer, which compare only at the same number"
        if reason:
            reasons[spec.option] = reason
    return reasons


def specs_of(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """The table, and the specs of your own that the contents of ``metrics.json`` describe, by key."""
    own = {key: MetricSpec(key, **each) for results in measured for key, each in results.get("own_metrics", {}).items()}
    return {**METRICS, **own}
