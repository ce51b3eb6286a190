"""Base class of classifier metrics: float64 sums of fixed size, by noise level and overall."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from calib_guidance.metrics.base import RankMetric


class Levels(NamedTuple("Levels", [("overall", Tensor), ("by_level", Tensor)])):
    """A metric over all samples and over those of each noise level, float64, NaN where there were none.

    Attributes:
        overall: scalar.
        by_level: ``(num_levels,)``.
    """

    def __new__(cls, overall: Tensor, by_level: Tensor) -> Levels:
        # torchmetrics squeezes what a metric computes, and one level would lose its axis.
        return super().__new__(cls, overall, torch.atleast_1d(by_level))


class Terms(NamedTuple):
    """What a batch adds to the sums of one level.

    Attributes:
        cell: ``(N, M)`` int64, the M cells that a sample adds to.
        values: C tensors ``(N, M)``, what it adds there.
    """

    cell: Tensor
    values: tuple[Tensor, ...]


def add_up(terms: Terms, num_cells: int) -> Tensor:
    """Sums ``(num_cells, C)`` float64 of the values in each cell."""
    sums = torch.zeros(num_cells, len(terms.values), dtype=torch.float64, device=terms.cell.device)
    # One column after the other: adding rows of three is four times slower on a CPU.
    for column, value in zip(sums.unbind(1), terms.values, strict=True):
        column.index_add_(0, terms.cell.flatten(), value.double().flatten())
    return sums


class LevelMetric(RankMetric):
    """A function of sums, by noise level and overall. Sums over ranks are exact, also where a rank has no data.

    A subclass says what a batch adds (:meth:`terms`) and what the sums mean (:meth:`value`).

    Args:
        shape: of the cells of one level.
        num_values: sums kept in each cell.
        num_levels: noise levels, ≥ 1.

    Raises:
        ValueError: no level or no cell.
    """

    higher_is_better = False

    def __init__(self, shape: tuple[int, ...], num_values: int, num_levels: int = 1, **kwargs: object):
        super().__init__(**kwargs)
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        if min(shape, default=1) < 1:
            raise ValueError(f"{type(self).__name__}: num_bins (and num_classes) must be at least 1, got {shape}")
        self.num_levels, self.num_cells = num_levels, math.prod(shape)
        sums = torch.zeros(num_levels, *shape, num_values, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")

    @abstractmethod
    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        """What logits ``(N, K)`` and classes ``(N,)`` add to the sums of a level."""

    @abstractmethod
    def value(self, sums: Tensor) -> Tensor:
        """The metric of sums ``(…, *shape, num_values)``, one for each of the leading axes."""

    def update(self, logits: Tensor, y: Tensor, level: Tensor | int = 0) -> None:
        """Count a batch.

        Args:
            logits: ``(N, K)``, of any floating type.
            y: ``(N,)`` true classes in [0, K).
            level: noise level in [0, num_levels), ``(N,)`` or one for all.

        Raises:
            ValueError: other shapes, or a level out of range (of a tensor on the CPU: reading one elsewhere would wait
                for the device).
        """
        if logits.ndim != 2 or y.shape != logits.shape[:1]:
            raise ValueError(
                f"{type(self).__name__} needs logits (N, K) and classes (N,), "
                f"got {tuple(logits.shape)} and {tuple(y.shape)}"
            )
        if isinstance(level, int):
            self._check(level, level)
            level = torch.full(y.shape, level, device=logits.device)
        elif level.shape != y.shape:
            raise ValueError(
                f"{type(self).__name__} needs one level or one for each of {len(y)} samples, got {tuple(level.shape)}"
            )
        elif level.device.type == "cpu" and len(level):
            self._check(int(level.min()), int(level.max()))
        self.add(self.terms(logits, y), level[:, None])

    def add(self, terms: Terms, level: Tensor | int) -> None:
        """Add what :meth:`terms` said of a batch to the sums of a level, or of one for each sample ``(N, 1)``."""
        cell, values = terms.cell + self.num_cells * level, terms.values
        # Not in place: sums that came out of inference mode could not be added to outside of it.
        self.sums = self.sums + add_up(Terms(cell, values), self.num_levels * self.num_cells).view_as(self.sums)

    def _check(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.num_levels:
            raise ValueError(
                f"{type(self).__name__} has num_levels = {self.num_levels}, levels 0 … {self.num_levels - 1}, "
                f"got levels {lowest} … {highest}"
            )

    def compute(self) -> Levels:
        return Levels(self.value(self.sums.sum(0)), self.value(self.sums))
