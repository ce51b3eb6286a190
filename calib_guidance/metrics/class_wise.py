"""Distances between the samples and the reference images of each class on its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from calib_guidance.metrics.frechet import covariance_root, frechet_distance, frechet_distance_sd, mean_and_covariance
from calib_guidance.metrics.precision_recall import inside_each_other

_FEWEST = 10  # samples a neighbour, below which the radii of balls are mostly chance


def _share(inside: Tensor) -> tuple[float, float]:
    """Share, and its standard deviation over draws of the points."""
    share = inside.double().mean()
    return float(share), float((share * (1 - share) / len(inside)).sqrt())


def class_wise_distances(
    reference: Tensor, reference_labels: Tensor, generated: Tensor, labels: Tensor, k: int = 3
) -> dict[str, dict[str, Any]]:
    """Fréchet distance, precision and recall of each class, where both sets have enough of it.

    A Fréchet distance needs more than 2·D samples of the class in each set, so that its bias does not drown it; precision and
    recall 10·k.

    Args:
        reference: ``(M, D)`` features.
        reference_labels: ``(M,)`` classes ≥ 0.
        generated: ``(N, D)`` features.
        labels: ``(N,)`` classes ≥ 0.
        k: neighbours that set the radius of a ball.

    Returns:
        For every class of the samples, by its number as text: ``num_samples``, ``num_reference``, the figures
        (``frechet_distance``, ``precision``, ``recall``), ``spread`` with the standard deviation of each over draws of the
        class's samples (recall: of its reference images), and ``left_out``, why a figure is missing.

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
        if few >= _FEWEST * k:
            inside = inside_each_other(real, made, k)
            for name, points in zip(("precision", "recall"), inside, strict=True):
                figures[name], spread[name] = _share(points)
        else:
            reason = f"{few} images in the smaller set; {_FEWEST * k} are needed for k = {k}"
            left_out |= {"precision": reason, "recall": reason}
        found[str(label)] = figures | {"spread": spread, "left_out": left_out}
    return found
