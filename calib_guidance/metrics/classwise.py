"""Distances between the samples and the reference images of each class on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calib_guidance.metrics.base import KeptRows, check_width
from calib_guidance.metrics.density_coverage import count_in_balls
from calib_guidance.metrics.frechet import covariance_root, frechet_distance, frechet_distance_sd, mean_and_covariance
from calib_guidance.metrics.precision_recall import inside_each_other

_FEWEST = 10  # samples a neighbour, below which the radii of balls are mostly chance
_NEIGHBOURS = 5  # of density and coverage


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean of values of points ``(N,)``, and its standard deviation over draws of the points."""
    values = values.double()
    return float(values.mean()), float(values.std(correction=0) / len(values) ** 0.5)


def classwise_distances(
    reference: Tensor, reference_labels: Tensor, generated: Tensor, labels: Tensor, k: int = 3
) -> dict[str, dict[str, Any]]:
    """Fréchet distance, precision, recall, density and coverage of each class, where both sets have enough of it.

    A Fréchet distance needs more than 2·D samples of the class in each set, so that its bias does not drown it; precision and
    recall 10·k; density and coverage, with k = 5, 50.

    Args:
        reference: ``(M, D)`` features.
        reference_labels: ``(M,)`` classes ≥ 0.
        generated: ``(N, D)`` features.
        labels: ``(N,)`` classes ≥ 0.
        k: neighbours that set the radius of a ball of precision and recall.

    Returns:
        For every class of the samples, by its number as text: ``num_samples``, ``num_reference``, the figures
        (``frechet_distance``, ``precision``, ``recall``, ``density``, ``coverage``), ``spread`` with the standard deviation of
        each over draws of the class's samples (recall and coverage: of its reference images), and ``left_out``, why a figure is
        missing.

    Raises:
        ValueError: not one label for each.
    """
    if len(reference) != len(reference_labels) or len(generated) != len(labels):
        raise ValueError(
            f"class-wise distances need a class for each of {len(reference)} and {len(generated)} features, got "
            f"{len(reference_labels)} and {len(labels)}"
        )
    d, found = reference.shape[1], {}
    for label in labels.unique().tolist():
        real, made = reference[reference_labels == label], generated[labels == label]
        few = min(len(real), len(made))
        figures: dict[str, Any] = {"num_samples": len(made), "num_reference": len(real)}
        spread, left_out = {}, {}
        if few > 2 * d:
            mean, covariance = mean_and_covariance(real)
            root = covariance_root(covariance)
            distance = frechet_distance(mean, covariance, *mean_and_covariance(made), root)
            figures["frechet_distance"] = float(distance)
            spread["frechet_distance"] = float(frechet_distance_sd((mean, covariance), made, root))
        else:
            left_out["frechet_distance"] = f"{few} images in the smaller set; {2 * d + 1} are needed for {d} features"
        for names, neighbours in ((("precision", "recall"), k), (("density", "coverage"), _NEIGHBOURS)):
            if few < _FEWEST * neighbours:
                reason = f"{few} images in the smaller set; {_FEWEST * neighbours} are needed for k = {neighbours}"
                left_out |= dict.fromkeys(names, reason)
                continue
            if names[0] == "precision":
                of_points = inside_each_other(real, made, neighbours)
            else:
                of_made, of_real = count_in_balls(real, made, neighbours)
                of_points = of_made / neighbours, of_real > 0
            for name, values in zip(names, of_points, strict=True):
                figures[name], spread[name] = _mean(values)
        found[str(label)] = figures | {"spread": spread, "left_out": left_out}
    return found


class ClasswiseDistances(KeptRows):
    """:func:`classwise_distances` of generated features. Keeps the features, in float32; exact over ranks.

    Args:
        reference: ``(M, D)`` features of the reference, the same on every rank.
        reference_labels: ``(M,)`` their classes.
        k: neighbours that set the radius of a ball of precision and recall.

    Raises:
        ValueError: not one class for each.
    """

    def __init__(self, reference: Tensor, reference_labels: Tensor, k: int = 3, **kwargs: object):
        if reference_labels.shape != reference.shape[:1]:
            raise ValueError(
                f"ClasswiseDistances needs a class for each of {len(reference)} features, got {tuple(reference_labels.shape)}"
            )
        columns = {"label": torch.zeros(0, dtype=torch.long), "features": reference[:0].float().cpu()}
        super().__init__(columns, **kwargs)
        self.k = k
        self.register_buffer("reference", reference.float(), persistent=False)
        self.register_buffer("reference_labels", reference_labels.long(), persistent=False)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add generated features ``(N, D)`` of the classes ``(N,)``.

        Raises:
            ValueError: features of another width than the reference's, or not one class for each.
        """
        check_width(features, self.reference.shape[1], type(self).__name__)
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"ClasswiseDistances needs a class for each of {len(features)} features, got {tuple(labels.shape)}"
            )
        super().update(features=features, label=labels, index=torch.zeros_like(labels))

    def compute(self) -> dict[str, dict[str, Any]]:
        """Of each class, see :func:`classwise_distances`."""
        rows = super().compute()
        return classwise_distances(self.reference, self.reference_labels, rows["features"], rows["label"], self.k)
