"""Every figure of a set of samples, with its spread: what the callback SampleQuality and ``calib-guidance evaluate`` share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_guidance.backend.atomic import atomic_write, write_text
from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.errors import ConfigurationError, first_line
from calib_guidance.evaluation.features import ClassifierFeatures, FeatureExtractor, state_sha256
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics.base import KeptRows
from calib_guidance.metrics.bootstrap import bootstrap_sums
from calib_guidance.metrics.calibration import calibration_error_from_bins, equal_width_bin
from calib_guidance.metrics.classwise import classwise_distances
from calib_guidance.metrics.density_coverage import count_in_balls
from calib_guidance.metrics.frechet import (
    FrechetDistance,
    extrapolated_frechet_distance,
    frechet_distance_sd,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.precision_recall import inside_each_other

METRICS = ("fid", "sfid", "is", "kid", "pr", "dc", "classwise", "classifier", "clip")
TABLE = {
    "frechet_distance": ("Fréchet distance", "{:.3f}"),
    "frechet_distance_infinite": ("Fréchet distance at N → ∞", "{:.3f}"),
    "spatial_frechet_distance": ("spatial Fréchet distance", "{:.3f}"),
    "inception_score": ("Inception score", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "kernel_distance_mean": ("kernel distance, mean of subsets", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "classifier_accuracy": ("accuracy", "{:.3f}"),
    "classifier_ece": ("classifier ECE", "{:.3f}"),
    "clip_score": ("CLIP score", "{:.4f}"),
    "integral_ece": ("integral ECE", "{:.3f}"),
    "seconds_per_image": ("seconds per image", "{:.4f}"),
}
_SPLITS, _SUBSETS, _SUBSET_SIZE, _NEIGHBOURS, _BINS, _POINTS = 10, 100, 1000, 5, 15, 15
NO_FEATURES = (
    "the reference holds no features of single images, only their statistics: give images, or make it with calib-guidance "
    "reference --keep-features"
)
_95 = 1.959964  # standard deviations


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
    """Which metrics are to be taken, and with what.

    Attributes:
        metrics: names of :data:`METRICS`: Fréchet distance, that of spatial features (sFID), Inception score, kernel
            distance (KID), precision and recall, density and coverage, what there is of these by class, accuracy and ECE of the
            evaluation classifier, CLIP score.
        extractor: of the features.
        eval_classifier: that names the samples' classes; None takes the extractor where it is :class:`ClassifierFeatures`.
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

    def applicable(self, reference: ReferenceHolds) -> tuple[str, ...]:
        """All metrics that the extractor, the evaluation classifier and the reference are for, whatever the number of samples."""
        has = {
            "sfid": self.extractor.spatial_width is not None and reference.spatial,
            "is": self.extractor.num_logits is not None and not self.extractor_classifies,
            "classifier": self.eval_classifier is not None or self.extractor_classifies,
            "clip": self.clip is not None,
            **dict.fromkeys(("kid", "pr", "dc"), reference.num_features is not None),
            "classwise": reference.num_features is not None and reference.labels,
        }
        return tuple(name for name in METRICS if has.get(name, True))

    def unmet(self, reference: ReferenceHolds, num_samples: int, labels_known: bool = True) -> dict[str, str]:
        """Which of the metrics cannot be taken of so many samples, and why.

        Args:
            reference: what it holds.
            num_samples: in the set.
            labels_known: whether the samples' classes are.

        Raises:
            ConfigurationError: an unknown metric.
        """
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ConfigurationError(f"metrics: unknown {', '.join(unknown)}; known: {', '.join(METRICS)}")
        n, m, found = num_samples, reference.num_features, {}
        for name, width in (("fid", self.extractor.width), ("sfid", self.extractor.spatial_width)):
            if width is None:
                found[name] = f"{self.extractor.name} has no spatial features; Inception has"
            elif name == "sfid" and not reference.spatial:
                found[name] = "the reference has no statistics of spatial features (mu_s, sigma_s)"
            else:
                found |= self._few(name, n, reference.num_images, width)
        if self.extractor.num_logits is None:
            found["is"] = f"{self.extractor.name} names no classes; Inception does"
        elif n < _SPLITS:
            found["is"] = f"{n} samples cannot be parted into {_SPLITS} splits"
        for name, samples, images in (("kid", 4, 4), ("pr", self.k + 1, self.k + 1), ("dc", 1, _NEIGHBOURS + 1)):
            if m is None:
                found[name] = NO_FEATURES
            elif m < images or n < samples:
                found[name] = f"needs {samples} samples and {images} reference images or more, got {n} and {m}"
        if m is None or not reference.labels:
            found["classwise"] = NO_FEATURES if m is None else "the reference's images have no classes"
        if self.eval_classifier is None and not self.extractor_classifies:
            found["classifier"] = "there is no evaluation classifier (--eval-classifier CLASSIFIER.yaml)"
        if self.clip is None:
            found["clip"] = "there is no CLIP model (--clip CLIP.yaml)"
        for name in ("classwise", "classifier", "clip"):
            if not labels_known:
                found.setdefault(name, "the samples' classes are not known")
        return {name: found[name] for name in METRICS if name in self.metrics and name in found}

    def _few(self, name: str, n: int, m: int | None, width: int) -> dict[str, str]:
        """Why a Fréchet distance cannot be taken, if so."""
        fewest = width + 1 if self.full_rank else 2
        if n >= fewest and (m is None or m >= fewest):
            return {}
        whose = f"{n} samples" if n < fewest else f"{m} images in the reference"
        if self.full_rank:
            return {
                name: f"{whose} with {width} features each, whose covariance is singular: more than {width} are needed "
                "(--allow-few for distances that compare only at the same number)"
            }
        return {name: f"{whose}: 2 are needed"}

    def to(self, device: torch.device) -> Measures:
        """The same, frozen and on a device."""
        for part in (self.eval_classifier, self.clip):
            if part is not None:
                part.freeze().to(device)
        self.extractor.eval().to(device)
        return self

    def check(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        """Try everything that sees images on empty ones.

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


class Quality:
    """Measures sets of samples against one reference.

    :meth:`begin` a set, :meth:`update` with its images, on several processes with a share each, and :meth:`compute`.

    Args:
        measures: what to take; moved to ``device``.
        reference: what the reference's features sum up to, of the same extractor.
        resamples: draws of the bootstrap.
        device: of images and sums.
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
        self._distances: dict[str, FrechetDistance] = {}  # their reference's root is kept from set to set

    # One set of samples

    def begin(self, num_samples: int, labels_known: bool = True) -> None:
        """Forget all samples and begin a set.

        Args:
            num_samples: in the set.
            labels_known: whether the samples' classes are.
        """
        unmet = self.measures.unmet(ReferenceHolds.of(self.reference), num_samples, labels_known)
        self._left_out = [f"{name} left out: {reason}" for name, reason in unmet.items()]
        self._wanted = {name for name in self.measures.metrics if name not in unmet}
        statistics = {
            "fid": (self.reference.mean, self.reference.covariance),
            "sfid": (self.reference.spatial_mean, self.reference.spatial_covariance),
        }
        for name in self._wanted & statistics.keys():
            if name not in self._distances:
                self._distances[name] = FrechetDistance(statistics[name], full_rank=False).to(self.device)
            self._distances[name].reset()
        columns = {"label": torch.zeros(0, dtype=torch.long)}
        if self._wanted & {"fid", "kid", "pr", "dc", "classwise"}:
            columns["pool"] = torch.zeros(0, self.extractor.width)
        if "sfid" in self._wanted:
            columns["spatial"] = torch.zeros(0, self.extractor.spatial_width)
        if "is" in self._wanted:
            columns["logits"] = torch.zeros(0, self.extractor.num_logits)
        if "classifier" in self._wanted:
            of_samples = torch.zeros(0, dtype=torch.float64)
            columns |= {"predicted": columns["label"], "confidence": of_samples, "of_label": of_samples}
        if "clip" in self._wanted:
            columns["similarity"] = torch.zeros(0)
        self._rows = KeptRows(columns).to(self.device)

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
        features = self.extractor(images)
        rows = {"label": labels, "index": index, **features._asdict()}
        for name, seen in (("fid", features.pool), ("sfid", features.spatial)):
            if name in self._wanted:
                self._distances[name].update(seen)
        if "classifier" in self._wanted:
            logits = (
                features.logits
                if self.measures.eval_classifier is None
                else self.measures.eval_classifier(from_uint8(images))
            )
            p = logits.double().softmax(1)
            _check_labels(labels, p.shape[1], "the evaluation classifier")
            rows["confidence"], rows["predicted"] = p.max(1)
            rows["of_label"] = p.gather(1, labels[:, None]).squeeze(1)
        if "clip" in self._wanted:
            similarity = self.measures.similarity(images)
            _check_labels(labels, similarity.shape[1], "the CLIP model")
            rows["similarity"] = similarity.gather(1, labels[:, None]).squeeze(1)
        self._rows.update(**rows)

    @torch.no_grad()
    def compute(self) -> dict[str, Any]:
        """Every figure of the set; the same on all processes, all of which must call it.

        Returns:
            Figures by name (:data:`TABLE`), ``by_class``, and ``spread`` by name: ``sd``, ``low`` and ``high`` (95 %,
            normal) and ``of``, what it is over; ``notes``; ``provenance`` of features, reference, evaluation
            classifier and CLIP model; ``num_samples``, ``num_reference`` and ``features``.
        """
        self._rows_of_all = rows = self._rows.rows()
        n = len(rows["index"])
        self._found: dict[str, Any] = {}
        self._spread: dict[str, dict[str, Any]] = {}
        self._notes = list(self._left_out)
        for name in METRICS:
            if name in self._wanted:
                getattr(self, f"_{name}")(rows)
        reference = self.reference
        return {
            **self._found,
            "spread": self._spread,
            "notes": [*self._notes, *reference.notes],
            "features": self.extractor.name,
            "num_measured": n,
            "num_reference": reference.num_images,
            "provenance": dict(self._provenance),
        }

    def predictions(self) -> dict[str, np.ndarray] | None:
        """Evaluation classifier's prediction for each sample of :meth:`compute`, for ``predictions.npz``; None without one.

        ``index``, ``label``, ``predicted`` int64 and ``confidence`` float32, the probability that it gives the sample's class.
        """
        if "classifier" not in self._wanted:
            return None
        rows = self._rows_of_all
        found = {name: rows[name].cpu().numpy() for name in ("index", "label", "predicted")}
        return found | {"confidence": rows["of_label"].float().cpu().numpy()}

    def _add(
        self, name: str, value: Tensor | float, sd: Tensor | float, of: str, least: float = 0, most: float = math.inf
    ) -> None:
        self._found[name] = float(value)
        if math.isfinite(sd):
            self._spread[name] = spread(value, sd, of, least, most)

    def _mean(self, name: str, values: Tensor, of: str, least: float = 0, most: float = 1, scale: float = 1) -> None:
        """A mean over samples, or over reference images, and its bootstrap."""
        values = values.double()[:, None] * scale
        n = len(values)
        if n and most == 1 and float(values.mean()) in (0, 1):  # a share, of which a bootstrap would be certain
            self._add(name, values.mean(), 1 / n, f"no difference among {n:,} {of}: 1/{n:,}", least, most)
            return
        sd = (bootstrap_sums(values, self.resamples) / n).std()
        self._add(name, values.mean(), sd, f"bootstrap over {of}, {self.resamples} draws", least, most)

    def _fid(self, rows: dict[str, Tensor]) -> None:
        metric = self._distances["fid"]
        mean, covariance, root = metric.reference_mean, metric.reference_covariance, metric.reference_root
        n, width = len(rows["pool"]), self.extractor.width
        strata, of = _strata(rows["label"])
        sd = frechet_distance_sd((mean, covariance), rows["pool"], root, strata)
        self._add("frechet_distance", metric.compute(), sd, of)
        counts = [c for c in (n, self.reference.num_images) if c is not None]
        if note := sample_count_note(min(counts), width):
            self._notes.append(f"Fréchet distance: {note}")
        if not self.measures.extrapolate:
            return
        # A tenth as in the paper; where that is not well above the width, the distance is no straight line in 1/N down there.
        smallest = n // 10 if n // 10 > 2 * width else 5 * width
        if smallest >= n:
            self._notes.append(f"no extrapolation: subsets of {smallest} samples and more cannot be drawn from {n}")
            return
        line = extrapolated_frechet_distance((mean, covariance), rows["pool"], smallest, _POINTS)
        x = 1 / line.sizes
        residual = line.distances - line.value - line.slope * x
        variance = residual.square().sum() / (_POINTS - 2)
        sd = (variance * (1 / _POINTS + x.mean().square() / (x - x.mean()).square().sum())).sqrt()
        of = f"straight line in 1/N through {_POINTS} subsets of {smallest} to {n} samples"
        self._add("frechet_distance_infinite", line.value, sd, of, least=-math.inf)
        if line.value < 0:
            self._notes.append("Fréchet distance at N → ∞: below 0, too few samples for a straight line")

    def _sfid(self, rows: dict[str, Tensor]) -> None:
        metric = self._distances["sfid"]
        reference = metric.reference_mean, metric.reference_covariance
        strata, of = _strata(rows["label"])
        sd = frechet_distance_sd(reference, rows["spatial"], metric.reference_root, strata)
        self._add("spatial_frechet_distance", metric.compute(), sd, of)

    def _is(self, rows: dict[str, Tensor]) -> None:
        splits = inception_score(rows["logits"], _SPLITS)
        of = f"{_SPLITS} splits, the spread of one"
        self._add("inception_score", splits.mean(), splits.std(correction=0), of, 1)
        if isinstance(self.extractor, ClassifierFeatures):
            self._notes.append(
                "Inception score: with the evaluation classifier's classes in place of Inception's, like no published one"
            )

    def _kid(self, rows: dict[str, Tensor]) -> None:
        reference, generated = self._reference_features, rows["pool"]
        size = min(_SUBSET_SIZE, min(len(reference), len(generated)) // 2)
        subsets = kernel_distance_subsets(reference, generated, _SUBSETS, size)
        of = f"{_SUBSETS} subsets of {size}, the spread of one"
        self._add(
            "kernel_distance", kernel_distance(reference, generated), subsets.std(correction=0), of, least=-math.inf
        )
        self._add("kernel_distance_mean", subsets.mean(), subsets.std(correction=0), of, least=-math.inf)

    def _pr(self, rows: dict[str, Tensor]) -> None:
        of_generated, of_reference = inside_each_other(self._reference_features, rows["pool"], self.measures.k)
        self._mean("precision", of_generated, "samples")
        self._mean("recall", of_reference, "reference images, the samples fixed")

    def _dc(self, rows: dict[str, Tensor]) -> None:
        of_points, of_balls = count_in_balls(self._reference_features, rows["pool"], _NEIGHBOURS)
        self._mean("density", of_points, "samples", most=math.inf, scale=1 / _NEIGHBOURS)
        self._mean("coverage", of_balls > 0, "reference images, the samples fixed")

    def _classwise(self, rows: dict[str, Tensor]) -> None:
        known = rows["label"] >= 0
        labels = self.reference.labels.to(self.device)
        found = classwise_distances(
            self._reference_features, labels, rows["pool"][known], rows["label"][known], self.measures.k
        )
        self._found["by_class"] = found
        reasons: dict[tuple[str, str], list[str]] = {}
        for label, figures in found.items():
            for name, reason in figures["left_out"].items():
                reasons.setdefault((name, reason), []).append(label)
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (name, reason), classes in reasons.items():
            alike.setdefault((reason, tuple(classes)), []).append(TABLE[name][0])
        for (reason, classes), names in alike.items():
            listed = f"classes {', '.join(classes[:10])}{' …' if len(classes) > 10 else ''} of {len(found)}"
            which = f"all {len(found)} classes" if len(classes) == len(found) else listed
            self._notes.append(f"{' and '.join(names)} by class left out of {which}: {reason}")

    def _classifier(self, rows: dict[str, Tensor]) -> None:
        correct = (rows["predicted"] == rows["label"]).double()
        self._mean("classifier_accuracy", correct, "samples")
        cells = torch.zeros(len(correct), _BINS, 3, dtype=torch.float64, device=self.device)
        terms = torch.stack([torch.ones_like(correct), rows["confidence"], correct], 1)
        cells[torch.arange(len(correct), device=self.device), equal_width_bin(rows["confidence"], _BINS)] = terms
        draws = calibration_error_from_bins(bootstrap_sums(cells.flatten(1), self.resamples).view(-1, _BINS, 3))
        of = f"bootstrap over samples, {self.resamples} draws"
        self._add("classifier_ece", calibration_error_from_bins(cells.sum(0)), draws.std(), of, 0, 1)
        for label, figures in self._found.get("by_class", {}).items():
            of_class = correct[rows["label"] == int(label)]
            figures["classifier_accuracy"] = float(of_class.mean())
            figures["spread"]["classifier_accuracy"] = float(of_class.std(correction=0) / len(of_class) ** 0.5)

    def _clip(self, rows: dict[str, Tensor]) -> None:
        self._mean("clip_score", rows["similarity"], "samples", least=-1)


def spread(
    value: Tensor | float, sd: Tensor | float, of: str, least: float = 0, most: float = math.inf
) -> dict[str, Any]:
    """A figure's spread for ``metrics.json``: ``sd``, ``low`` and ``high`` (95 %, normal, within the possible) and ``of``."""
    value, sd = float(value), float(sd)
    return {"sd": sd, "low": max(least, value - _95 * sd), "high": min(most, value + _95 * sd), "of": of}


def _strata(labels: Tensor) -> tuple[Tensor | None, str]:
    """Classes within which samples are drawn, where they are as good as equally many, and what a spread is over then."""
    count = labels.unique(return_counts=True)[1]
    if len(count) > 1 and int(count.max()) - int(count.min()) <= 1 and int(labels.min()) >= 0:
        return labels, "samples within their classes, which are balanced; delta method, the reference fixed"
    return None, "samples, delta method, the reference fixed"


def _check_labels(labels: Tensor, num_classes: int, whose: str) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ConfigurationError(
            f"the samples are of classes {int(labels.min())} … {int(labels.max())}, {whose} knows {num_classes}, from 0 on"
        )


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and spread of every figure that a table shows, as text; an empty spread where there is none."""
    rows = []
    for key, (label, form) in TABLE.items():
        value = results.get(key)
        if value is not None:
            found = results.get("spread", {}).get(key)
            text = form.format(value)
            text = text.removeprefix("-") if float(text) == 0 else text  # rounding below zero
            rows.append((label, text, "" if found is None else f"± {form.format(found['sd'])}"))
    return rows


def described(results: dict[str, Any]) -> list[str]:
    """What the figures were measured with and on, what the spreads are of, and the notes: a line each."""
    provenance = results["provenance"]
    features, resize = provenance["features"], provenance["features"]["resize"]
    size = f"resized to {resize['size']} ({resize['how']}; {resize['library']})" if resize["size"] else "not resized"
    lines = [
        f"features   {features['extractor']}; {features['library']}; weights {features['weights_sha256'][:12]}; {size}",
        f"samples    {_images(provenance['samples'], results['num_measured'])}",
        f"reference  {_images(provenance['reference'].get('images', {}), results['num_reference'])}",
    ]
    if "file" in provenance["reference"]:
        lines[-1] += f"; from {provenance['reference']['file']} ({provenance['reference']['sha256'][:12]})"
    for name in ("eval_classifier", "clip"):
        if name in provenance:
            lines.append(f"{name:<10} {provenance[name]['class']}; weights {provenance[name]['weights_sha256'][:12]}")
    for name in ("precision", "recall", "classifier_accuracy"):
        shares = [(c[name], label) for label, c in results.get("by_class", {}).items() if name in c]
        if shares:
            (least, worst), (most, best) = min(shares), max(shares)
            named = f"{least:.3f} (class {worst}) … {most:.3f} (class {best}), {len(shares)} classes"
            lines.append(f"by class   {TABLE[name][0]} {named}")
    return lines + described_spreads(results) + [f"note       {note}" for note in results["notes"]]


def described_spreads(results: dict[str, Any]) -> list[str]:
    """What the spreads are of: a line for each kind."""
    over: dict[str, list[str]] = {}
    for name, each in results["spread"].items():
        over.setdefault(each["of"], []).append(TABLE[name][0])
    return [f"±          {', '.join(names)}: {of}" for of, names in over.items()]


def _images(images: dict[str, Any], count: int | None) -> str:
    """A set of images in a line."""
    words = ["an unknown number of images" if count is None else f"{count:,} images"]
    if "source" in images:
        words[0] += f" of {images['source']} ({images['kind']})"
        words.append(
            "×".join(map(str, images["image_shape"][1:])) + (" grey" if images["image_shape"][0] == 1 else " RGB")
        )
        if images.get("preprocessing"):
            words.append(images["preprocessing"]["how"])
        if images.get("uint8_rule"):
            words.append(f"uint8 rule {images['uint8_rule']}")
        if images.get("sha256"):
            words.append(f"sha256 {images['sha256'][:12]}")
        if images.get("num_unreadable"):
            words.append(f"{images['num_unreadable']} could not be read: {', '.join(images['unreadable'])}")
    return "; ".join(words)


def write_predictions(path: Path, predictions: Mapping[str, np.ndarray]) -> None:
    """Write :meth:`Quality.predictions`, atomically."""
    with atomic_write(path) as file:
        np.savez(file, **predictions)


def plain(value: Any) -> Any:
    """What JSON has, of mappings, lists and numbers: NaN as null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all, see :func:`plain`."""
    write_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")
