"""Distances between the samples and the reference images of each class on its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from calib_guidance.metrics.frechet import covariance_root, frechet_distance, frechet_distance_std, mean_and_covariance
from calib_guidance.metrics.neighbors import count_in_balls, inside_each_other

_FEWEST = 10  # samples a neighbor, below which the radii of balls are mostly chance
_NEIGHBORS = 5  # of density and coverage


def classwise_distances(
    reference: Tensor, reference_labels: Tensor, generated: Tensor, labels: Tensor, k: int = 3
) -> dict[str, dict[str, Any]]:
    """Fréchet distance, precision, recall, density and coverage of each class, where both sets have enough of it.

    A Fréchet distance needs more than 2·D samples of the class in each set, or its bias dominates; precision and
    recall 10·k; density and coverage, with k = 5, 50.

    Args:
        reference: ``(M, D)`` features.
        reference_labels: ``(M,)`` classes ≥ 0.
        generated: ``(N, D)`` features.
        labels: ``(N,)`` classes ≥ 0.
        k: neighbors that set the radius of a ball of precision and recall.

    Returns:
        For every class of the samples, by its number as text: ``num_samples``, ``num_reference``, the metrics
        (``fd``, ``precision``, ``recall``, ``density``, ``coverage``), ``std`` with the standard deviation of
        each over draws of the class's samples (recall and coverage: of its reference images), and ``skipped``, why a metric is
        missing.
    """
    if len(reference) != len(reference_labels) or len(generated) != len(labels):
        raise ValueError(
            f"classwise distances need a class for each of {len(reference)} and {len(generated)} features, got "
            f"{len(reference_labels)} and {len(labels)}"
        )
    d, found = reference.shape[1], {}
    for label in labels.unique().tolist():
        real, made = reference[reference_labels == label], generated[labels == label]
        few = min(len(real), len(made))
        values: dict[str, Any] = {"num_samples": len(made), "num_reference": len(real)}
        std, skipped = {}, {}
        if few > 2 * d:
            mean, covariance = mean_and_covariance(real)
            root = covariance_root(covariance)
            distance = frechet_distance(mean, covariance, *mean_and_covariance(made), root)
            values["fd"] = float(distance)
            std["fd"] = float(frechet_distance_std((mean, covariance), made, root))
        else:
            skipped["fd"] = f"{few} images in the smaller set; {2 * d + 1} are needed for {d} features"
        for names, neighbors in ((("precision", "recall"), k), (("density", "coverage"), _NEIGHBORS)):
            if few < _FEWEST * neighbors:
                reason = f"{few} images in the smaller set; {_FEWEST * neighbors} are needed for k = {neighbors}"
                skipped |= dict.fromkeys(names, reason)
                continue
            if names[0] == "precision":
                of_points = inside_each_other(real, made, neighbors)
            else:
                of_made, of_real = count_in_balls(real, made, neighbors)
                of_points = of_made / neighbors, of_real > 0
            for name, each in zip(names, of_points, strict=True):
                values[name] = float(each.double().mean())
                std[name] = float(each.double().std(correction=0) / len(each) ** 0.5)
        found[str(label)] = values | {"std": std, "skipped": skipped}
    return found
