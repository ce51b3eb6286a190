"""Density and coverage (Naeem et al. 2020, https://arxiv.org/abs/2002.09797)."""

from __future__ import annotations

from torch import Tensor

from calib_guidance.metrics.neighbours import count_inside, knn_radii


def count_in_balls(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """How many of the reference's k-NN balls hold each generated point, and how many of the points each ball holds.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 5 in the paper.

    Returns:
        ``(N,)`` and ``(M,)`` int64; the mean of the first over k is the density, the fraction of the second above 0 the coverage.

    Raises:
        ValueError: k or fewer points in the reference, or nothing generated.
    """
    if not len(generated):
        raise ValueError("density and coverage need at least one generated point, got none")
    if len(reference) <= k:
        raise ValueError(f"density and coverage with k = {k} need a reference of more than {k}, got {len(reference)}")
    return count_inside(generated, reference, knn_radii(reference, k))


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density: how many of the reference's k-NN balls hold a generated point, over k. Coverage: fraction of balls that hold any.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 5 in the paper.

    Returns:
        Density ≥ 0, about 1 where both sets follow one distribution, and coverage in [0, 1]; scalars
        float64.

    Raises:
        ValueError: k or fewer points in the reference, or nothing generated.
    """
    of_balls = count_in_balls(reference, generated, k)[1]
    return of_balls.double().sum() / (k * len(generated)), (of_balls > 0).double().mean()
