"""Accuracy, negative log-likelihood and Brier score: means over samples."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from calib_guidance.metrics.levels import LevelMetric, Terms


def _is_correct(logits: Tensor, y: Tensor, top_k: int) -> Tensor:
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must lie in [1, {logits.shape[1]}], the number of classes, got {top_k}")
    own = logits.gather(1, y[:, None])
    # Ties go to the lower class, as in the argmax that the calibration errors count by; no logit is below NaN.
    before = torch.arange(logits.shape[1], device=y.device) < y[:, None]
    rank = (~(logits <= own) | (before & (logits == own))).sum(1)
    return (rank < top_k).double()


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.double().log_softmax(1).gather(1, y[:, None]).squeeze(1)


def _brier(logits: Tensor, y: Tensor) -> Tensor:
    p = logits.double().softmax(1)
    return p.scatter_add(1, y[:, None], torch.full_like(p[:, :1], -1)).square().sum(1)


def accuracy(logits: Tensor, y: Tensor, top_k: int = 1) -> Tensor:
    """Fraction of samples whose true class is among the ``top_k`` with the largest logits.

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.
        top_k: in [1, K].

    Returns:
        Scalar float64 in [0, 1].

    Raises:
        ValueError: top_k out of range.
    """
    return _is_correct(logits, y, top_k).mean()


def negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of −log p(y|x), in nats, scalar float64, of logits ``(N, K)`` and true classes ``(N,)``."""
    return _nll(logits, y).mean()


def brier_score(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of Σ_k (p(k|x) − [k = y])², scalar float64 in [0, 2] (Brier 1950), of logits ``(N, K)`` and classes ``(N,)``."""
    return _brier(logits, y).mean()


class _Mean(LevelMetric):
    """Mean over samples of one value for each.

    Args:
        num_levels: noise levels.
    """

    def __init__(self, num_levels: int = 1, **kwargs: object):
        super().__init__((), 2, num_levels, **kwargs)

    @abstractmethod
    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        """The value of each sample, ``(N,)``."""

    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        values = self.of_samples(logits, y)[:, None]
        return Terms(torch.zeros_like(values, dtype=torch.long), (torch.ones_like(values), values))

    def value(self, sums: Tensor) -> Tensor:
        count, total = sums.unbind(-1)
        return total / count


class Accuracy(_Mean):
    """:func:`accuracy`.

    Args:
        top_k: how many of the classes with the largest logits count.
        num_levels: noise levels.
    """

    higher_is_better = True

    def __init__(self, top_k: int = 1, num_levels: int = 1, **kwargs: object):
        super().__init__(num_levels, **kwargs)
        self.top_k = top_k

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        return _is_correct(logits, y, self.top_k)


class NegativeLogLikelihood(_Mean):
    """:func:`negative_log_likelihood`.

    Args:
        num_levels: noise levels.
    """

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        return _nll(logits, y)


class BrierScore(_Mean):
    """:func:`brier_score`.

    Args:
        num_levels: noise levels.
    """

    def of_samples(self, logits: Tensor, y: Tensor) -> Tensor:
        return _brier(logits, y)
