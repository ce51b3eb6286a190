"""Balls around points, out to their k-th nearest neighbours, in blocks: memory does not grow with the product of the sets."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS = 2048, 8192  # a block of distances takes 128 MB


def knn_radii(features: Tensor, k: int) -> Tensor:
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


def count_inside(points: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Count which points lie in which balls, the surface included.

    Args:
        points: ``(N, D)``.
        centres: ``(M, D)``.
        radii: ``(M,)``.

    Returns:
        The number of balls that hold each point, ``(N,)``, and of points in each ball, ``(M,)``; int64.
    """
    of_points = torch.zeros(len(points), dtype=torch.long, device=points.device)
    of_balls = torch.zeros(len(centres), dtype=torch.long, device=points.device)
    for first in range(0, len(points), _ROWS):
        rows = slice(first, first + _ROWS)
        block = points[rows].double()
        for second in range(0, len(centres), _COLUMNS):
            columns = slice(second, second + _COLUMNS)
            inside = torch.cdist(block, centres[columns].double()) <= radii[columns]
            of_points[rows] += inside.sum(1)
            of_balls[columns] += inside.sum(0)
    return of_points, of_balls
