"""Metrics of a classifier's logits, from float64 sums of fixed size, by noise level and overall."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Levels(NamedTuple("Levels", [("overall", Tensor), ("by_level", Tensor)])):
    """A metric over all samples, scalar, and over those of each noise level, ``(num_levels,)``; float64, NaN where none were.

    Examples:
        >>> metric = Accuracy(num_levels=2)
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]), level=torch.tensor([0, 1]))
        >>> metric.compute()
        Levels(overall=tensor(0.5000, dtype=torch.float64), by_level=tensor([1., 0.], dtype=torch.float64))
    """

    def __new__(cls, overall: Tensor, by_level: Tensor) -> Levels:
        # torchmetrics squeezes what a metric computes, and one level would lose its axis.
        return super().__new__(cls, overall, torch.atleast_1d(by_level))


def add_up(cell: Tensor, values: tuple[Tensor, ...], num_cells: int) -> Tensor:
    """Sums ``(num_cells, C)`` float64 of C values ``(N, M)`` in the cells ``(N, M)``."""
    sums = torch.zeros(num_cells, len(values), dtype=torch.float64, device=cell.device)
    # One column after the other: adding rows of three is four times slower on a CPU.
    for column, value in zip(sums.unbind(1), values, strict=True):
        column.index_add_(0, cell.flatten(), value.double().flatten())
    return sums


class LevelMetric(Metric):
    """A function of sums, by noise level and overall. Sums over ranks are exact, also where a rank has no data.

    A subclass says what a batch adds (:meth:`terms`) and what the sums mean (:meth:`value`). :meth:`of` is the pure function.
    One level has cells of a ``shape``, with ``num_values`` sums in each.

    Example:
        >>> float(Accuracy().of(torch.eye(3), torch.tensor([0, 1, 1])))
        0.6666666666666666
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, shape: tuple[int, ...], num_values: int, num_levels: int = 1, **kwargs: object):
        # A rank that would answer from its cache, having seen nothing new, would leave the others waiting for it.
        super().__init__(compute_with_cache=False, **kwargs)
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        if min(shape, default=1) < 1:
            raise ValueError(f"{type(self).__name__}: num_bins (and num_classes) must be at least 1, got {shape}")
        self.shape, self.num_levels, self.num_cells = shape, num_levels, math.prod(shape)
        sums = torch.zeros(num_levels, *shape, num_values, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """True: a rank without data takes part with its empty state, which torchmetrics would warn of."""
        return True

    @abstractmethod
    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What logits ``(N, K)`` and classes ``(N,)`` add to a level: cells ``(N, M)`` int64, then values ``(N, M)`` for them."""

    @abstractmethod
    def value(self, sums: Tensor) -> Tensor:
        """The metric of sums ``(…, *shape, num_values)``, one for each of the leading axes."""

    def of(self, logits: Tensor, y: Tensor) -> Tensor:
        """The metric of logits ``(N, K)`` and true classes ``(N,)`` alone, whatever was counted before."""
        cell, *values = self.terms(logits, y)
        return self.value(add_up(cell, tuple(values), self.num_cells).view(*self.shape, -1))

    def update(self, logits: Tensor, y: Tensor, level: Tensor | int = 0) -> None:
        """Count logits ``(N, K)`` and true classes ``(N,)`` at noise levels in [0, num_levels), ``(N,)`` or one for all."""
        name = type(self).__name__
        if logits.ndim != 2 or y.shape != logits.shape[:1]:
            shapes = f"{tuple(logits.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{name} needs logits (N, K) and classes (N,), got {shapes}")
        if isinstance(level, int):
            level = torch.full(y.shape, level)
        if level.shape != y.shape:
            raise ValueError(f"{name} needs one level or one for each of {len(y)} samples, got {tuple(level.shape)}")
        if level.device.type == "cpu" and len(level):  # to check levels on a GPU would wait for it
            lowest, highest = int(level.min()), int(level.max())
            if lowest < 0 or highest >= self.num_levels:
                raise ValueError(
                    f"{name} has num_levels = {self.num_levels}, levels 0 … {self.num_levels - 1}, "
                    f"got levels {lowest} … {highest}"
                )
        self.add(self.terms(logits, y), level.to(logits.device)[:, None])

    def add(self, terms: tuple[Tensor, ...], level: Tensor | int) -> None:
        """Add :meth:`terms` of a batch to the sums of a level, or of one for each sample ``(N, 1)``."""
        cell, *values = terms
        added = add_up(cell + self.num_cells * level, tuple(values), self.num_levels * self.num_cells)
        # Not in place: sums that came out of inference mode could not be added to outside of it.
        self.sums = self.sums + added.view_as(self.sums)

    def compute(self) -> Levels:
        return Levels(self.value(self.sums.sum(0)), self.value(self.sums))


class _Mean(LevelMetric):
    """Mean over samples of one value for each."""

    def __init__(self, num_levels: int = 1, **kwargs: object):
        super().__init__((), 2, num_levels, **kwargs)

    @abstractmethod
    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        """The value of each sample, ``(N,)``."""

    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = self.of_samples(logits, y)[:, None]
        return torch.zeros_like(values, dtype=torch.long), torch.ones_like(values), values

    def value(self, sums: Tensor) -> Tensor:
        count, total = sums.unbind(-1)
        return total / count


class Accuracy(_Mean):
    """Fraction of samples whose true class is among the ``top_k`` with the largest logits, in [1, K].

    Examples:
        >>> metric = Accuracy()
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> round(float(metric.compute().overall), 4)
        0.6667
    """

    higher_is_better = True

    def __init__(self, top_k: int = 1, num_levels: int = 1, **kwargs: object):
        super().__init__(num_levels, **kwargs)
        self.top_k = top_k

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        if not 1 <= self.top_k <= logits.shape[1]:
            raise ValueError(f"top_k must lie in [1, {logits.shape[1]}], the number of classes, got {self.top_k}")
        own = logits.gather(1, y[:, None])
        # Ties go to the lower class, as in the argmax that the calibration errors count by; no logit is below NaN.
        before = torch.arange(logits.shape[1], device=y.device) < y[:, None]
        rank = (~(logits <= own) | (before & (logits == own))).sum(1)
        return (rank < self.top_k).double()


class NegativeLogLikelihood(_Mean):
    """Mean of −log p(y|x), in nats.

    Examples:
        >>> round(float(NegativeLogLikelihood().of(torch.zeros(2, 4), torch.tensor([0, 3])).exp()), 4)
        4.0
    """

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        return -logits.double().log_softmax(1).gather(1, y[:, None]).squeeze(1)


class BrierScore(_Mean):
    """Mean of Σ_k (p(k|x) − [k = y])², in [0, 2] (Brier 1950).

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2]]).log()
        >>> round(float(BrierScore().of(logits, torch.tensor([0]))), 4)  # 0.2² + 0.2²
        0.08
    """

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        p = logits.double().softmax(1)
        return p.scatter_add(1, y[:, None], torch.full_like(p[:, :1], -1)).square().sum(1)
