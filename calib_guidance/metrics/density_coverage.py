"""Density and coverage (Naeem et al. 2020, https://arxiv.org/abs/2002.09797)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.metrics.base import RankMetric, check_width
from calib_guidance.metrics.neighbours import count_inside, knn_radii


def _check_reference(reference: Tensor, k: int) -> None:
    if len(reference) <= k:
        raise ValueError(f"density and coverage with k = {k} need a reference of more than {k}, got {len(reference)}")


def _from_counts(of_balls: Tensor, num_generated: Tensor | int, k: int) -> tuple[Tensor, Tensor]:
    return of_balls.double().sum() / (k * num_generated), (of_balls > 0).double().mean()


def count_in_balls(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """How many of the reference's k-NN balls hold each generated point, and how many of the points each ball holds.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 5 in the paper.

    Returns:
        ``(N,)`` and ``(M,)`` int64; the mean of the first over k is the density, the share of the second above 0 the coverage.

    Raises:
        ValueError: k or fewer points in the reference, or nothing generated.
    """
    if not len(generated):
        raise ValueError("density and coverage need at least one generated point, got none")
    _check_reference(reference, k)
    return count_inside(generated, reference, knn_radii(reference, k))


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density: how many of the reference's k-NN balls hold a generated point, over k. Coverage: share of balls that hold any.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 5 in the paper.

    Returns:
        Density ≥ 0, of which 1 is expected where both sets follow one distribution, and coverage in [0, 1]; scalars
        float64.

    Raises:
        ValueError: k or fewer points in the reference, or nothing generated.
    """
    return _from_counts(count_in_balls(reference, generated, k)[1], len(generated), k)


class DensityCoverage(RankMetric):
    """:func:`density_coverage` from one sum for each point of the reference, exact over ranks.

    Args:
        reference: ``(M, D)`` features of the reference, the same on every rank.
        k: neighbours that set the radius of a ball.

    Raises:
        ValueError: k or fewer points in the reference.
    """

    higher_is_better = True

    def __init__(self, reference: Tensor, k: int = 5, **kwargs: object):
        super().__init__(**kwargs)
        _check_reference(reference, k)
        self.k = k
        self.register_buffer("reference", reference.float(), persistent=False)
        self.register_buffer("radii", knn_radii(self.reference, k), persistent=False)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("of_balls", torch.zeros(len(reference), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add generated features ``(N, D)``.

        Raises:
            ValueError: of another width than the reference's.
        """
        check_width(features, self.reference.shape[1], type(self).__name__)
        self.count = self.count + len(features)
        self.of_balls = self.of_balls + count_inside(features.float(), self.reference, self.radii)[1]

    def compute(self) -> dict[str, Tensor]:
        """``density`` and ``coverage``; NaN without samples."""
        density, coverage = _from_counts(self.of_balls, self.count, self.k)
        return {"density": density, "coverage": coverage.where(self.count > 0, torch.nan)}
