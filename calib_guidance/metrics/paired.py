"""Differences of a metric between two sets of samples that share noise and labels: delete-block jackknife (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calib_guidance.metrics.moments import jackknife_std

LEVEL, POWER = 0.95, 0.8  # of intervals, and of the smallest difference that is called resolvable


class PairedDifference(NamedTuple):
    """A difference of a metric between two runs, A − B.

    Attributes:
        value: the difference, less the bias of few samples where it was asked for.
        std: its standard error.
        low, high: 95 % interval, of Student's t.
        resolvable: smallest true difference that such an interval excludes zero for with a probability of 0.8.
        unpaired_std: standard error if the runs did not share noise, from the same blocks.

    Examples:
        >>> found = PairedDifference(value=-0.2, std=0.05, low=-0.3, high=-0.1, resolvable=0.15, unpaired_std=0.1)
        >>> found.high < 0  # the interval excludes zero: A is lower
        True
    """

    value: float
    std: float
    low: float
    high: float
    resolvable: float
    unpaired_std: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high


def jackknife_blocks(labels: Tensor, num_blocks: int) -> Tensor:
    """The block of each sample, ``(N,)`` int64 in 0 … num_blocks − 1: equally many samples of each class in every block.

    Args:
        labels: classes ``(N,)`` int64, in order of the samples' index.
        num_blocks: 2 or more, at most N; 20 to 50 are usual.
    """
    if not 2 <= num_blocks <= len(labels):
        raise ValueError(f"blocks must be from 2 to {len(labels)}, the number of samples, got {num_blocks}")
    block = torch.empty_like(labels)
    block[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device) % num_blocks
    return block


def paired_difference(
    values: tuple[float, float], without: tuple[Tensor, Tensor], unbias: bool = False
) -> PairedDifference:
    """The difference of a metric between sets A and B of paired samples.

    θ = θ_A − θ_B, se² = (G − 1)/G·Σ_g (θ_(g) − θ̄)², and without bias G·θ − (G − 1)·θ̄, where θ_(g) is without block g and θ̄ their
    mean. The reference that both are measured against counts as fixed.

    Args:
        values: the metric of all samples of A and of B.
        without: the metric of A and of B without each of the G blocks, ``(G,)`` each; the blocks are the same samples of both.
        unbias: whether to remove what is proportional to 1/N, as in a Fréchet distance of few samples.

    Examples:
        >>> a, b = torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
        >>> without = [(x.sum() - x) / 3 for x in (a, b)]  # means; blocks of one sample
        >>> found = paired_difference((float(a.mean()), float(b.mean())), tuple(without))
        >>> round(found.value, 4), round(found.std, 4)  # std of a − b over √4
        (1.0, 0.4082)
    """
    deleted = [each.double() for each in without]
    difference, groups = deleted[0] - deleted[1], len(deleted[0])
    value = values[0] - values[1]
    if unbias:
        value = groups * value - (groups - 1) * float(difference.mean())
    std = float(jackknife_std(difference))
    unpaired = math.hypot(*(float(jackknife_std(each)) for each in deleted))
    return _with_interval(value, std, unpaired, groups - 1)


def mean_difference(differences: Sequence[PairedDifference], num_blocks: int) -> PairedDifference:
    """Mean over independent pairs of runs, such as several seeds, each of ``num_blocks`` jackknife blocks."""
    count = len(differences)
    std, unpaired = (
        math.sqrt(sum(each**2 for each in of)) / count
        for of in ([d.std for d in differences], [d.unpaired_std for d in differences])
    )
    return _with_interval(sum(d.value for d in differences) / count, std, unpaired, count * (num_blocks - 1))


def _with_interval(value: float, std: float, unpaired: float, freedom: int) -> PairedDifference:
    from scipy.special import stdtrit

    quantile, power = float(stdtrit(freedom, (1 + LEVEL) / 2)), float(stdtrit(freedom, POWER))
    half = quantile * std
    return PairedDifference(value, std, value - half, value + half, (quantile + power) * std, unpaired)


def samples_to_resolve(value: float, std: float, num_samples: int, fraction: float = 0.05) -> float:
    """Samples of each of two independent runs whose difference of ``fraction`` of a metric an interval tells from zero.

    In 4 of 5 repetitions, where the standard error of the metric, ``std`` with ``num_samples``, falls as 1/√N.

    Examples:
        >>> round(samples_to_resolve(1.0, 0.02, 1000))  # 2·(1.96 + 0.84)²·0.02²/0.05²·1000
        2512
    """
    # Of the normal distribution: quantiles of LEVEL (two-sided) and of POWER.
    return 2 * ((1.959964 + 0.841621) * std / (fraction * value)) ** 2 * num_samples


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p of the sign test: how likely so many equal signs are, if both were equally likely. Zeros do not count.

    Examples:
        >>> sign_test([0.1, 0.2, 0.3, 0.1, 0.2])  # 2/2⁵
        0.0625
    """
    signs = [d > 0 for d in differences if d]
    count, fewer = len(signs), min(sum(signs), len(signs) - sum(signs))
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)
