"""Improved precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991)."""

from __future__ import annotations

from torch import Tensor

from calib_guidance.metrics.neighbours import count_inside, knn_radii


def inside_each_other(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which generated points lie in the reference's k-NN balls, and which reference points in the generated ones'.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 3 in the field.

    Returns:
        ``(N,)`` and ``(M,)`` bool; their means are precision and recall.

    Raises:
        ValueError: k or fewer points in one of the sets.
    """
    if min(len(reference), len(generated)) <= k:
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} points, got {len(reference)} and {len(generated)}"
        )
    inside = [
        count_inside(points, centres, knn_radii(centres, k))[0] > 0
        for points, centres in ((generated, reference), (reference, generated))
    ]
    return inside[0], inside[1]


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Precision: fraction of generated points in the reference's k-NN balls. Recall: the reverse.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 3 in the field.

    Returns:
        Precision and recall, scalars float64 in [0, 1].

    Raises:
        ValueError: k or fewer points in one of the sets.
    """
    of_generated, of_reference = inside_each_other(reference, generated, k)
    return of_generated.double().mean(), of_reference.double().mean()
