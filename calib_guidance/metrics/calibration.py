"""Expected calibration error with equal-width bins, from sums of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def calibration_bins(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Sums over the bins of confidence, bin b being (b/B, (b+1)/B].

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.

    Returns:
        ``(num_bins, 3)`` float64: count, summed confidence and number correct in each bin.
    """
    confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
    confidence = confidence.double()
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (prediction == y).double()], dim=1)
    return torch.zeros(num_bins, 3, dtype=torch.float64, device=logits.device).index_add_(0, bins, values)


def calibration_error_from_bins(bins: Tensor) -> Tensor:
    """ECE = Σ_b n_b/n·|accuracy_b − confidence_b| of sums ``(…, num_bins, 3)``; NaN where nothing was counted."""
    count, confidence, correct = bins.unbind(-1)
    return (correct - confidence).abs().sum(-1) / count.sum(-1)


class CalibrationError(Metric):
    """ECE of the largest softmax probability, ``num_bins`` equal-width bins, exact over ranks.

    The state is a fixed number of float64 sums, unlike torchmetrics' own, which keeps every confidence.

    Args:
        num_bins: number of bins; 15 in the papers.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, num_bins: int = 15, **kwargs: object):
        super().__init__(**kwargs)
        self.num_bins = num_bins
        self.add_state("bins", torch.zeros(num_bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, y: Tensor) -> None:
        """Count logits ``(N, K)`` against true classes ``(N,)``."""
        self.bins += calibration_bins(logits, y, self.num_bins)

    def compute(self) -> Tensor:
        return calibration_error_from_bins(self.bins)


class TrajectoryCalibrationError(Metric):
    """ECE_t at every step of sampling, against the class being sampled (arXiv 2310.11311 Eq. 1).

    Its mean over the steps at which the classifier ran is the integral ECE.

    Args:
        num_steps: steps of the trajectory.
        num_bins: number of bins; 15 in the papers.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, num_steps: int, num_bins: int = 15, **kwargs: object):
        super().__init__(**kwargs)
        self.num_bins = num_bins
        self.add_state("bins", torch.zeros(num_steps, num_bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, step: int, logits: Tensor, y: Tensor) -> None:
        """Count logits ``(N, K)`` of one step against classes ``(N,)``."""
        self.bins[step] += calibration_bins(logits, y, self.num_bins)

    def compute(self) -> Tensor:
        """ECE_t ``(num_steps,)``, NaN where the classifier did not run."""
        return calibration_error_from_bins(self.bins)
