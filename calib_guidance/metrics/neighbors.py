"""Metrics of k-nearest-neighbor balls, in blocks: memory does not grow with the product of the sets.

Improved precision and recall (https://arxiv.org/abs/1904.06991), density and coverage (https://arxiv.org/abs/2002.09797).

Distances are those of float64. Products of float32 matrices tell nearly all pairs apart, by more than they can be wrong; only
the others are computed in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.precision import exact_float32

_ROWS, _COLUMNS = 2048, 8192  # a block of distances takes 64 MB in float32
_PAIRS = 8192  # in float64 at a time, 134 MB at 2048 features
_SPARE = 8  # further neighbors that are looked at, because float32 may change their order


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pairs(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Squared distances ``(P,)`` float64 of the rows ``first`` of a and ``second`` of b, ``(P,)`` each."""
    found = torch.empty(len(first), dtype=torch.float64, device=a.device)
    for part in _blocks(len(first), _PAIRS):
        found[part] = (a[first[part]].double() - b[second[part]].double()).square().sum(1)
    return found


class _Squares:
    """Squared distances in float32 of rows of a and b, from which their mean is subtracted, and how wrong they can be."""

    def __init__(self, a: Tensor, b: Tensor):
        center = a.mean(0, dtype=torch.float64)
        self.a = self._shifted(a, center)
        self.b = self.a if b is a else self._shifted(b, center)
        self.norms = [x.square().sum(1) for x in (self.a, self.b)]
        # Twice that of a sum of D products in any order, and of the rounding before and after it.
        self.bound = (a.shape[1] + 16) * torch.finfo(torch.float32).eps

    @staticmethod
    def _shifted(x: Tensor, center: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for rows in _blocks(len(x), _ROWS):
            out[rows] = x[rows].double() - center
        return out

    def __call__(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Squared distances ``(rows, columns)`` and the largest error of each."""
        sizes = self.norms[0][rows, None] + self.norms[1][columns]
        with exact_float32():
            return torch.addmm(sizes, self.a[rows], self.b[columns].T, alpha=-2), self.bound * sizes


def _squared_radii(features: Tensor, k: int, processes: DistributedContext) -> Tensor:
    """Squared distance of each of the features ``(N, D)``, N > k, to its k-th nearest other one, ``(N,)`` float64."""
    n, squares = len(features), _Squares(features, features)
    kept, index = min(k + _SPARE, n - 1), torch.arange(n, device=features.device)
    nearest = torch.full((n, kept), torch.inf, device=features.device)
    places = torch.zeros(n, kept, dtype=torch.long, device=features.device)

    def merge(rows: slice, found: Tensor, first: int) -> None:
        """Take the distances ``(rows, M)`` to the features from ``first`` on among the nearest."""
        values, at = found.topk(min(kept, found.shape[1]), dim=1, largest=False)
        nearest[rows], order = torch.cat([nearest[rows], values], dim=1).topk(kept, dim=1, largest=False)
        places[rows] = torch.cat([places[rows], at + first], dim=1).gather(1, order)

    # Distances are symmetric: a block beside the diagonal is one of its columns too. Several processes have rows of their own.
    blocks, alone = _blocks(n, _ROWS), processes.world_size == 1
    mine = _mine(blocks, processes)
    for i, rows in mine:
        for columns in blocks[i:] if alone else blocks:
            found, _ = squares(rows, columns)
            if columns == rows:
                found.fill_diagonal_(torch.inf)
            elif alone:
                merge(columns, found.T, rows.start)
            merge(rows, found, columns.start)
    own = torch.cat([index[rows] for _, rows in mine]) if mine else index[:0]
    radii = torch.zeros(n, dtype=torch.float64, device=features.device)
    radii[own] = _radii_of(features, own, nearest[own], places[own], squares, k)
    return processes.sum(radii)


def _mine(blocks: Sequence[slice], processes: DistributedContext) -> list[tuple[int, slice]]:
    """The blocks of this process, with their numbers."""
    return list(enumerate(blocks))[processes.rank :: processes.world_size]


def _radii_of(features: Tensor, own: Tensor, nearest: Tensor, places: Tensor, squares: _Squares, k: int) -> Tensor:
    """Squared radii of the rows ``own`` ``(P,)``, from candidates and their distances in float32, ``(P, kept)``."""
    kept = places.shape[1]
    radii = _pairs(features, features, own.repeat_interleave(kept), places.flatten()).view(-1, kept)
    radii = radii.sort(dim=1).values[:, k - 1]
    if kept < len(features) - 1:
        # A point within the radius has a norm of at most that of the center plus the radius.
        norms = squares.norms[0][own].double()
        error = squares.bound * (norms + (norms.sqrt() + radii.sqrt()).square())
        unsure = (nearest[:, -1] - error <= radii).nonzero().flatten()
        for part in unsure.split(_ROWS):
            radii[part] = _radii_in_float64(features, own[part], k, kept)
    return radii


def _radii_in_float64(features: Tensor, rows: Tensor, k: int, kept: int) -> Tensor:
    """Squared radii of some rows ``(P,)``, whose nearest features float32 cannot tell from others."""
    nearest, places = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long)
    nearest, places = nearest.double().to(features.device), places.to(features.device)
    for columns in _blocks(len(features), _COLUMNS):
        found = torch.cdist(features[rows].double(), features[columns].double())
        index = torch.arange(columns.start, columns.stop, device=features.device)
        found = found.masked_fill(rows[:, None] == index, torch.inf)
        nearest, order = torch.cat([nearest, found], dim=1).topk(min(kept, nearest.shape[1] + len(index)), 1, False)
        places = torch.cat([places, index.expand(len(rows), -1)], dim=1).gather(1, order)
    true = _pairs(features, features, rows.repeat_interleave(places.shape[1]), places.flatten())
    return true.view(places.shape).sort(dim=1).values[:, k - 1]


def _inside(found: Tensor, error: Tensor, limit: Tensor, true: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Whether squared distances are at most ``limit``, float64 that broadcasts; ``true`` computes those that are too close."""
    below = limit.float()
    inside = found <= below
    rows, columns = ((found - below).abs() <= error).nonzero(as_tuple=True)
    inside[rows, columns] = true(rows, columns) <= limit.expand(found.shape)[rows, columns]
    return inside


def _half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances ``(N, M)`` with the rounding of float16, as ADM's evaluator has them: not symmetric."""
    a, b = a.half(), b.half()
    norms = [x.square().float().sum(1).half() for x in (a, b)]
    squared = (norms[0][:, None] - 2 * (a.float() @ b.float().T).half() + norms[1]).clamp(min=0)
    return squared.float() if squared.isfinite().all() else torch.cdist(a.float(), b.float()).square()


def _half_radii(features: Tensor, k: int) -> Tensor:
    radii = []
    for rows in features.split(_ROWS):
        nearest = _half_distances(rows, features[:0])
        for columns in features.split(_COLUMNS):
            nearest = torch.cat([nearest, _half_distances(rows, columns)], dim=1)
            # k + 1, because each is also its own nearest.
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _check(k: int, reference: Tensor, generated: Tensor) -> None:
    if not len(generated) or len(reference) <= k:
        counts = f"{len(reference)} and {len(generated)}"
        raise ValueError(f"balls of {k} neighbors need more than {k} points and a point to look for, got {counts}")


def count_in_balls(reference: Tensor, generated: Tensor, k: int = 5, half: bool = False) -> tuple[Tensor, Tensor]:
    """How many of the reference's k-NN balls hold each generated point, and how many of the points each ball holds.

    ``(N,)`` and ``(M,)`` int64 of features ``(M, D)``, M > k, and ``(N, D)``, N ≥ 1. A ball has its surface. ``half``
    computes features and squared distances in float16, as ADM's evaluator; float64 otherwise.
    """
    _check(k, reference, generated)
    of_points = torch.zeros(len(generated), dtype=torch.long, device=generated.device)
    of_balls = torch.zeros(len(reference), dtype=torch.long, device=generated.device)
    radii = _half_radii(reference, k) if half else _squared_radii(reference, k, DistributedContext())
    squares = None if half else _Squares(generated, reference)
    for rows in _blocks(len(generated), _ROWS):
        for columns in _blocks(len(reference), _COLUMNS):
            a, b = generated[rows], reference[columns]
            if squares is None:
                inside = _half_distances(a, b) <= radii[columns]
            else:
                inside = _inside(*squares(rows, columns), radii[columns], functools.partial(_pairs, a, b))
            of_points[rows] += inside.sum(1)
            of_balls[columns] += inside.sum(0)
    return of_points, of_balls


def in_balls(
    reference: Tensor, generated: Tensor, k: int = 3, half: bool = False, processes: DistributedContext | None = None
) -> tuple[Tensor, Tensor]:
    """Whether each generated point lies in a k-NN ball of the reference, ``(N,)``, and each reference point in one of the
    generated points, ``(M,)``; bool of features as of :func:`count_in_balls`. Distances are computed once for both. Processes,
    which all have both sets, share the work; None is this one alone.
    """
    processes = processes or DistributedContext()
    _check(k, reference, generated)
    _check(k, generated, reference)
    if half:
        pairs = (reference, generated), (generated, reference)
        precise, recalled = (count_in_balls(*pair, k, half)[0] > 0 for pair in pairs)
        return precise, recalled
    of_reference, of_generated = (_squared_radii(x, k, processes) for x in (reference, generated))
    squares = _Squares(generated, reference)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=generated.device)
    for _, rows in _mine(_blocks(len(generated), _ROWS), processes):
        for columns in _blocks(len(reference), _COLUMNS):
            block, true = squares(rows, columns), functools.partial(_pairs, generated[rows], reference[columns])
            precise[rows] |= _inside(*block, of_reference[columns], true).any(1)
            recalled[columns] |= _inside(*block, of_generated[rows, None], true).any(0)
    precise, recalled = (processes.sum(found.long()) > 0 for found in (precise, recalled))
    return precise, recalled


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3, half: bool = False) -> tuple[Tensor, Tensor]:
    """Precision: fraction of generated points in the reference's k-NN balls. Recall: the reverse.

    Of features ``(M, D)`` and ``(N, D)`` as of :func:`count_in_balls`; scalars float64 in [0, 1]. k is 3 in the field.

    Examples:
        >>> reference, generated = torch.arange(8.0)[:, None], torch.arange(4.0)[:, None]
        >>> precision, recall = precision_recall(reference, generated, k=1)
        >>> float(precision), float(recall)  # the ball of 3 reaches to 4
        (1.0, 0.625)
    """
    precise, recalled = in_balls(reference, generated, k, half)
    return precise.double().mean(), recalled.double().mean()


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density: how many of the reference's k-NN balls hold a generated point, over k. Coverage: fraction of balls that hold any.

    Scalars float64. Density is about 1 where both sets follow one distribution, coverage in [0, 1]. k is 5 in the paper.
    """
    of_balls = count_in_balls(reference, generated, k)[1]
    return of_balls.double().sum() / (k * len(generated)), (of_balls > 0).double().mean()
