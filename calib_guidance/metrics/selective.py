"""Selective classification: the risk of predictions in order of confidence (Geifman & El-Yaniv 2017; Geifman et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.metrics.calibration import ConfidenceHistogram


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage k/N and the error rate of the k most confident predictions, ``(N,)`` float64 each, k = 1 … N.

    Where confidences are equal, it is the mean over all orders of them.

    Args:
        confidence: ``(N,)``, N ≥ 1.
        correct: ``(N,)``, 1 where the prediction is right, else 0.

    Examples:
        >>> coverage, risk = risk_coverage(torch.tensor([0.9, 0.6, 0.8]), torch.tensor([1, 0, 1]))
        >>> [round(float(value), 4) for value in risk]
        [0.0, 0.0, 0.3333]
    """
    order = confidence.argsort(descending=True, stable=True)
    values, error = confidence[order], 1 - correct[order].double()
    _, group, count = values.unique_consecutive(return_inverse=True, return_counts=True)
    # Among equal confidences each place has the mean error of the group.
    mean = torch.zeros(len(count), dtype=error.dtype, device=error.device).index_add_(0, group, error) / count
    place = torch.arange(1, len(values) + 1, dtype=error.dtype, device=error.device)
    return place / len(values), mean[group].cumsum(0) / place


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk–coverage curve: mean of :func:`risk_coverage` over k. Random confidences give the error rate."""
    return risk_coverage(confidence, correct)[1].mean()


def aurc_of_oracle(error_rate: Tensor) -> Tensor:
    """r + (1 − r)·ln(1 − r), the limit of many samples where all wrong predictions are the least confident ones."""
    right = 1 - error_rate
    return error_rate + torch.xlogy(right, right)


class AreaUnderRiskCoverage(ConfidenceHistogram):
    """AURC of the largest softmax probability, from the fine histogram of log-odds; lower is better.

    Confidences within a cell of the histogram count as equal. :func:`aurc` sorts them, and differs by less than 1e-3.

    Args:
        excess: subtract :func:`aurc_of_oracle` (E-AURC): the order of confidences counts, the accuracy does not.

    Examples:
        >>> logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
        >>> y = torch.tensor([0, 1])  # right where it is sure
        >>> round(float(AreaUnderRiskCoverage().of(logits, y)), 4)  # (0 + 1/2)/2
        0.25
    """

    def __init__(self, num_levels: int = 1, excess: bool = False, **kwargs: object):
        super().__init__(num_levels, **kwargs)
        self.excess = excess

    def value(self, sums: Tensor) -> Tensor:
        count, _, correct = (column.flip(-1) for column in sums.unbind(-1))  # the most confident first
        error = count - correct
        before, wrong = count.cumsum(-1) - count, error.cumsum(-1) - error
        # Σ_{j=1…m} (E + e·j/m)/(k + j) = e + (E − e·k/m)·(H(k + m) − H(k)) of a cell of m samples, e of them wrong.
        rate = error / count.clamp(min=1)
        harmonic = torch.digamma(before + count + 1) - torch.digamma(before + 1)
        area = (error + (wrong - rate * before) * harmonic).sum(-1) / count.sum(-1)
        return area - aurc_of_oracle(error.sum(-1) / count.sum(-1)) if self.excess else area
