"""Metrics of k-nearest-neighbor balls, in blocks: memory does not grow with the product of the sets.

Improved precision and recall (https://arxiv.org/abs/1904.06991), density and coverage (https://arxiv.org/abs/2002.09797).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS = 2048, 8192  # a block of distances takes 128 MB


def _distances(a: Tensor, b: Tensor, half: bool) -> Tensor:
    """Distances ``(N, M)`` in float64, or squared and with the rounding of float16."""
    if not half:
        return torch.cdist(a.double(), b.double())
    a, b = a.half(), b.half()
    norms = [x.square().float().sum(1).half() for x in (a, b)]
    squared = (norms[0][:, None] - 2 * (a.float() @ b.float().T).half() + norms[1]).clamp(min=0)
    return squared.float() if squared.isfinite().all() else torch.cdist(a.float(), b.float()).square()


def _radii(features: Tensor, k: int, half: bool) -> Tensor:
    """Distance of each of the features ``(N, D)``, N > k, to its k-th nearest other one, ``(N,)``."""
    radii = []
    for rows in features.split(_ROWS):
        nearest = _distances(rows, features[:0], half)
        for columns in features.split(_COLUMNS):
            nearest = torch.cat([nearest, _distances(rows, columns, half)], dim=1)
            # k + 1, because each is also its own nearest.
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def count_in_balls(reference: Tensor, generated: Tensor, k: int = 5, half: bool = False) -> tuple[Tensor, Tensor]:
    """How many of the reference's k-NN balls hold each generated point, and how many of the points each ball holds.

    ``(N,)`` and ``(M,)`` int64 of features ``(M, D)``, M > k, and ``(N, D)``, N ≥ 1. A ball has its surface. ``half``
    computes features and squared distances in float16, as ADM's evaluator; float64 otherwise.
    """
    if not len(generated) or len(reference) <= k:
        counts = f"{len(reference)} and {len(generated)}"
        raise ValueError(f"balls of {k} neighbors need more than {k} points and a point to look for, got {counts}")
    radii = _radii(reference, k, half)
    of_points = torch.zeros(len(generated), dtype=torch.long, device=generated.device)
    of_balls = torch.zeros(len(reference), dtype=torch.long, device=generated.device)
    for first in range(0, len(generated), _ROWS):
        rows = slice(first, first + _ROWS)
        for second in range(0, len(reference), _COLUMNS):
            columns = slice(second, second + _COLUMNS)
            inside = _distances(generated[rows], reference[columns], half) <= radii[columns]
            of_points[rows] += inside.sum(1)
            of_balls[columns] += inside.sum(0)
    return of_points, of_balls


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3, half: bool = False) -> tuple[Tensor, Tensor]:
    """Precision: fraction of generated points in the reference's k-NN balls. Recall: the reverse.

    Of features ``(M, D)`` and ``(N, D)`` as of :func:`count_in_balls`; scalars float64 in [0, 1]. k is 3 in the field.

    Examples:
        >>> reference, generated = torch.arange(8.0)[:, None], torch.arange(4.0)[:, None]
        >>> precision, recall = precision_recall(reference, generated, k=1)
        >>> float(precision), float(recall)  # the ball of 3 reaches to 4
        (1.0, 0.625)
    """
    inside, found = count_in_balls(reference, generated, k, half)[0], count_in_balls(generated, reference, k, half)[0]
    return (inside > 0).double().mean(), (found > 0).double().mean()


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density: how many of the reference's k-NN balls hold a generated point, over k. Coverage: fraction of balls that hold any.

    Scalars float64. Density is about 1 where both sets follow one distribution, coverage in [0, 1]. k is 5 in the paper.
    """
    of_balls = count_in_balls(reference, generated, k)[1]
    return of_balls.double().sum() / (k * len(generated)), (of_balls > 0).double().mean()
