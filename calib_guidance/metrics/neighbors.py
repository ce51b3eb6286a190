"""Metrics of k-nearest-neighbor balls, in blocks: memory does not grow with the product of the sets.

Improved precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991), density and coverage (Naeem et al.
2020, https://arxiv.org/abs/2002.09797).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS = 2048, 8192  # a block of distances takes 128 MB


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each of the features ``(N, D)``, N > k, to its k-th nearest other one, ``(N,)`` float64."""
    radii = []
    for rows in features.split(_ROWS):
        rows = rows.double()
        nearest = rows.new_empty(len(rows), 0)
        for columns in features.split(_COLUMNS):
            nearest = torch.cat([nearest, torch.cdist(rows, columns.double())], dim=1)
            # k + 1, because each is also its own nearest.
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def count_in_balls(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """How many of the reference's k-NN balls hold each generated point, and how many of the points each ball holds.

    The surface of a ball belongs to it.

    Args:
        reference: ``(M, D)`` features, M > k.
        generated: ``(N, D)`` features, N ≥ 1.
        k: neighbors that set the radius of a ball.

    Returns:
        ``(N,)`` and ``(M,)`` int64.
    """
    if not len(generated):
        raise ValueError("density and coverage need at least one generated point, got none")
    if len(reference) <= k:
        raise ValueError(f"density and coverage with k = {k} need a reference of more than {k}, got {len(reference)}")
    radii = _radii(reference, k)
    of_points = torch.zeros(len(generated), dtype=torch.long, device=generated.device)
    of_balls = torch.zeros(len(reference), dtype=torch.long, device=generated.device)
    for first in range(0, len(generated), _ROWS):
        rows = slice(first, first + _ROWS)
        block = generated[rows].double()
        for second in range(0, len(reference), _COLUMNS):
            columns = slice(second, second + _COLUMNS)
            inside = torch.cdist(block, reference[columns].double()) <= radii[columns]
            of_points[rows] += inside.sum(1)
            of_balls[columns] += inside.sum(0)
    return of_points, of_balls


def inside_each_other(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which generated points ``(N,)`` lie in the reference's k-NN balls, and which reference points ``(M,)`` in the other balls.

    Arguments as of :func:`precision_recall`, which is their means.
    """
    if min(len(reference), len(generated)) <= k:
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} points, got {len(reference)} and {len(generated)}"
        )
    return count_in_balls(reference, generated, k)[0] > 0, count_in_balls(generated, reference, k)[0] > 0


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Precision: fraction of generated points in the reference's k-NN balls. Recall: the reverse.

    Of features ``(M, D)`` and ``(N, D)``, M and N above k; scalars float64 in [0, 1]. k is 3 in the field.
    """
    of_generated, of_reference = inside_each_other(reference, generated, k)
    return of_generated.double().mean(), of_reference.double().mean()


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density: how many of the reference's k-NN balls hold a generated point, over k. Coverage: fraction of balls that hold any.

    Of features ``(M, D)``, M > k, and ``(N, D)``; scalars float64. Density is about 1 where both sets follow one distribution,
    coverage lies in [0, 1]. k is 5 in the paper.
    """
    of_balls = count_in_balls(reference, generated, k)[1]
    return of_balls.double().sum() / (k * len(generated)), (of_balls > 0).double().mean()
