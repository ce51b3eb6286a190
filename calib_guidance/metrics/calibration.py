"""Calibration errors with bins, from sums of fixed size. torchmetrics' own keeps every confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.metrics.levels import LevelMetric, Terms, add_up
from calib_guidance.training.losses import equal_width_bin

# The fine histogram of log-odds. With K classes the largest probability has log-odds of −log(K − 1) or more; above 20
# it is within 2e-9 of 1.
_LOWEST, _HIGHEST, _CELLS = -12.0, 20.0, 4096


def confidence_and_correct(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Largest softmax probability and whether its class is the true one, both ``(N,)`` float64."""
    confidence, prediction = logits.double().softmax(1).max(1)
    return confidence, (prediction == y).double()


def bin_cells(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """What each sample adds to the sums of :func:`calibration_bins`, ``(N, num_bins, 3)`` float64: for the bootstrap.

    Args:
        confidence: ``(N,)`` largest probability.
        correct: ``(N,)`` 1 where its class is the true one, else 0.
        num_bins: number of bins.
    """
    cells = torch.zeros(len(correct), num_bins, 3, dtype=torch.float64, device=correct.device)
    values = torch.stack([torch.ones_like(correct), confidence, correct], 1)
    cells[torch.arange(len(correct), device=correct.device), equal_width_bin(confidence, num_bins)] = values
    return cells


def _confidence_terms(logits: Tensor, y: Tensor, num_bins: int) -> Terms:
    confidence, correct = (value[:, None] for value in confidence_and_correct(logits, y))
    return Terms(equal_width_bin(confidence, num_bins), (torch.ones_like(confidence), confidence, correct))


def _class_terms(logits: Tensor, y: Tensor, num_bins: int) -> Terms:
    p = logits.double().softmax(1)
    cell = num_bins * torch.arange(p.shape[1], device=p.device) + equal_width_bin(p, num_bins)
    return Terms(cell, (torch.ones_like(p), p, torch.zeros_like(p).scatter(1, y[:, None], 1.0)))


def _log_odds_terms(logits: Tensor, y: Tensor) -> Terms:
    confidence, correct = (value[:, None] for value in confidence_and_correct(logits, y))
    # log p/(1 − p) from the logits of the other classes, since 1 − p itself rounds to 0 near 1.
    largest, prediction = logits.double().max(1, keepdim=True)
    odds = largest - logits.double().scatter(1, prediction, -torch.inf).logsumexp(1, keepdim=True)
    cell = ((odds - _LOWEST) * (_CELLS / (_HIGHEST - _LOWEST))).nan_to_num(nan=0).clamp(0, _CELLS - 1).long()
    return Terms(cell, (torch.ones_like(confidence), confidence, correct))


def calibration_bins(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Sums over the bins of confidence, bin b being (b/B, (b+1)/B].

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.
        num_bins: number of bins.

    Returns:
        ``(num_bins, 3)`` float64: count, summed confidence and number correct in each bin.
    """
    return add_up(_confidence_terms(logits, y, num_bins), num_bins)


def calibration_error_from_bins(bins: Tensor) -> Tensor:
    """ECE = Σ_b n_b/n·|accuracy_b − confidence_b| of sums ``(…, num_bins, 3)``; NaN where nothing was counted."""
    count, confidence, correct = bins.unbind(-1)
    return (correct - confidence).abs().sum(-1) / count.sum(-1)


def maximum_calibration_error_from_bins(bins: Tensor) -> Tensor:
    """max_b |accuracy_b − confidence_b| over filled bins of sums ``(…, num_bins, 3)``; NaN where nothing was counted."""
    count, confidence, correct = bins.unbind(-1)
    error = ((correct - confidence) / count.clamp(min=1)).abs().amax(-1)
    return error.where(count.sum(-1) > 0, torch.nan)


def _equal_mass(histogram: Tensor, num_bins: int) -> Tensor:
    """Merge cells ``(…, cells, 3)`` into ``(…, num_bins, 3)`` of the same count, splitting the cells at the edges."""
    below = F.pad(histogram.cumsum(-2), (0, 0, 1, 0))  # sums below each edge between cells
    count = below[..., 0].contiguous()
    edges = count[..., -1:] * torch.arange(num_bins + 1, device=count.device) / num_bins
    right = torch.searchsorted(count, edges).clamp(min=1)[..., None].expand(*edges.shape, 3)
    low, high = below.gather(-2, right - 1), below.gather(-2, right)
    fraction = (edges[..., None] - low[..., :1]) / (high[..., :1] - low[..., :1]).clamp(min=1)
    return (low + fraction * (high - low)).diff(dim=-2)


def calibration_error(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """ECE of the largest softmax probability with equal-width bins (Guo et al. 2017, Eq. 3).

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.
        num_bins: number of bins; 15 in the papers.

    Returns:
        Scalar float64 in [0, 1].
    """
    return calibration_error_from_bins(calibration_bins(logits, y, num_bins))


def maximum_calibration_error(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Largest |accuracy − confidence| of the equal-width bins with samples (Guo et al. 2017, Eq. 5).

    Arguments and range as of :func:`calibration_error`.
    """
    return maximum_calibration_error_from_bins(calibration_bins(logits, y, num_bins))


def adaptive_calibration_error(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """ECE of the largest softmax probability with bins of equal mass (Nguyen & O'Connor 2015; Nixon et al. 2019).

    Every bin holds N/num_bins samples in the order of their confidence; a sample at an edge is divided. The order is
    that of a histogram of 4096 log-odds; samples in one cell count as tied. In the tests that differs from
    sorting them by 0.16/√N at most, and by 0.001 on average for 2,000 samples.

    Arguments and range as of :func:`calibration_error`.
    """
    return calibration_error_from_bins(_equal_mass(add_up(_log_odds_terms(logits, y), _CELLS), num_bins))


def classwise_calibration_error(logits: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Mean over classes k of the ECE of p(k|x) against [k = y], with equal-width bins.

    Also called static calibration error (Kull et al. 2019; Nixon et al. 2019). Arguments and range as of
    :func:`calibration_error`.
    """
    classes = logits.shape[1]
    bins = add_up(_class_terms(logits, y, num_bins), classes * num_bins).view(classes, num_bins, 3)
    return calibration_error_from_bins(bins).mean()


class ReliabilityBins(LevelMetric):
    """:func:`calibration_bins`, what a reliability diagram is drawn from.

    ``compute().overall`` is ``(num_bins, 3)`` and ``by_level`` ``(num_levels, num_bins, 3)``: count, summed confidence
    and number correct; zero where there were no samples.

    Args:
        num_bins: number of bins; 15 in the papers.
        num_levels: noise levels.
    """

    def __init__(self, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__((num_bins,), 3, num_levels, **kwargs)
        self.num_bins = num_bins

    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        return _confidence_terms(logits, y, self.num_bins)

    def value(self, sums: Tensor) -> Tensor:
        return sums


class CalibrationError(ReliabilityBins):
    """:func:`calibration_error`.

    With the steps of sampling as levels, ``by_level`` is ECE_t and its mean the integral ECE (arXiv 2310.11311 Eq. 1).

    Args:
        num_bins: number of bins; 15 in the papers.
        num_levels: noise levels.
    """

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(sums)


class MaximumCalibrationError(ReliabilityBins):
    """:func:`maximum_calibration_error`.

    Args:
        num_bins: number of bins; 15 in the papers.
        num_levels: noise levels.
    """

    def value(self, sums: Tensor) -> Tensor:
        return maximum_calibration_error_from_bins(sums)


class AdaptiveCalibrationError(LevelMetric):
    """:func:`adaptive_calibration_error`. Keeps 98 kB of sums for each level.

    Args:
        num_bins: number of bins, ≥ 1.
        num_levels: noise levels.

    Raises:
        ValueError: no bin.
    """

    def __init__(self, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__((_CELLS,), 3, num_levels, **kwargs)
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        self.num_bins = num_bins

    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        return _log_odds_terms(logits, y)

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(_equal_mass(sums, self.num_bins))


class ClasswiseCalibrationError(LevelMetric):
    """:func:`classwise_calibration_error`. Keeps 360 bytes of sums for each class and level.

    Args:
        num_classes: K.
        num_bins: number of bins; 15 in the papers.
        num_levels: noise levels.
    """

    def __init__(self, num_classes: int, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__((num_classes, num_bins), 3, num_levels, **kwargs)
        self.num_classes, self.num_bins = num_classes, num_bins

    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the logits have shape {tuple(logits.shape)}")
        return _class_terms(logits, y, self.num_bins)

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(sums).mean(-1)
