"""Calibration errors from sums of fixed size, which torchmetrics' own are not: those keep every confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.metrics.classification import LevelMetric
from calib_guidance.training.losses import equal_width_bin

# The fine histogram of log-odds. With K classes the largest probability has log-odds of −log(K − 1) or more; above 20
# it is within 2e-9 of 1.
_LOWEST, _HIGHEST, _CELLS = -12.0, 20.0, 4096
_POINTS, _BISECTIONS = 1001, 20  # of the grid and the width of the smooth error


def _confidence_and_correct(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Largest softmax probability and whether its class is the true one, both ``(N, 1)`` float64."""
    confidence, prediction = logits.double().softmax(1).max(1, keepdim=True)
    return confidence, (prediction == y[:, None]).double()


def bin_cells(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """What each sample adds to the sums of :class:`ReliabilityBins`, ``(N, num_bins, 3)`` float64: for the bootstrap."""
    values = torch.stack([torch.ones_like(correct), confidence, correct], 1).double()
    return F.one_hot(equal_width_bin(confidence, num_bins), num_bins)[..., None] * values[:, None]


def calibration_error_from_bins(bins: Tensor) -> Tensor:
    """ECE = Σ_b n_b/n·|accuracy_b − confidence_b| of sums ``(…, num_bins, 3)``; NaN where nothing was counted."""
    count, confidence, correct = bins.unbind(-1)
    return (correct - confidence).abs().sum(-1) / count.sum(-1)


def _equal_mass(histogram: Tensor, num_bins: int) -> Tensor:
    """Merge cells ``(…, cells, 3)`` into ``(…, num_bins, 3)`` of the same count, splitting the cells at the edges."""
    below = F.pad(histogram.cumsum(-2), (0, 0, 1, 0))  # sums below each edge between cells
    count = below[..., 0].contiguous()
    edges = count[..., -1:] * torch.arange(num_bins + 1, device=count.device) / num_bins
    right = torch.searchsorted(count, edges).clamp(min=1)[..., None].expand(*edges.shape, 3)
    low, high = below.gather(-2, right - 1), below.gather(-2, right)
    fraction = (edges[..., None] - low[..., :1]) / (high[..., :1] - low[..., :1]).clamp(min=1)
    return (low + fraction * (high - low)).diff(dim=-2)


class ReliabilityBins(LevelMetric):
    """Sums over the bins of confidence, bin b being (b/B, (b+1)/B], that a reliability diagram is drawn from.

    ``overall`` is ``(num_bins, 3)`` and ``by_level`` ``(num_levels, num_bins, 3)``: count, summed confidence and number
    correct; zero where there were no samples. The papers have 15 bins.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]]).log()
        >>> ReliabilityBins(num_bins=4).of(logits, torch.tensor([0, 1, 1]))  # count, summed confidence, number correct
        tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000],
                [1.0000, 0.6000, 1.0000],
                [2.0000, 1.6000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__((num_bins,), 3, num_levels, **kwargs)
        self.num_bins = num_bins

    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        confidence, correct = _confidence_and_correct(logits, y)
        return equal_width_bin(confidence, self.num_bins), torch.ones_like(confidence), confidence, correct

    def value(self, sums: Tensor) -> Tensor:
        return sums


class CalibrationError(ReliabilityBins):
    """ECE of the largest softmax probability with equal-width bins, in [0, 1] (Guo et al. 2017, Eq. 3).

    With the steps of sampling as levels, ``by_level`` is ECE_t and its mean the integral ECE (arXiv 2310.11311 Eq. 1).

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> metric = CalibrationError(num_levels=2)
        >>> metric.update(logits, torch.tensor([0, 1]), level=torch.tensor([0, 1]))
        >>> [round(float(value), 4) for value in metric.compute().by_level]
        [0.2, 0.8]
        >>> round(float(metric.compute().overall), 4)  # one of two is right at a confidence of 0.8
        0.3
    """

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(sums)


class SignedCalibrationError(ReliabilityBins):
    """Mean confidence − accuracy, in [−1, 1]: above 0 over-confident. Misses what cancels, unlike :class:`CalibrationError`.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> round(float(SignedCalibrationError().of(logits, torch.tensor([0, 1]))), 4)  # confidence 0.8, accuracy 0.5
        0.3
    """

    def value(self, sums: Tensor) -> Tensor:
        count, confidence, correct = sums.sum(-2).unbind(-1)
        return (confidence - correct) / count


class OverconfidenceError(ReliabilityBins):
    """The part of the ECE from bins whose confidence is above their accuracy; ECE = 2·this − :class:`SignedCalibrationError`.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]).log()
        >>> y = torch.tensor([0, 1, 1, 1])  # half right at 0.8, all right at 0.6
        >>> [round(float(metric.of(logits, y)), 4) for metric in (OverconfidenceError(), CalibrationError())]
        [0.15, 0.35]
    """

    def value(self, sums: Tensor) -> Tensor:
        count, confidence, correct = sums.unbind(-1)
        return (confidence - correct).clamp(min=0).sum(-1) / count.sum(-1)


class MaximumCalibrationError(ReliabilityBins):
    """Largest |accuracy − confidence| of the equal-width bins with samples (Guo et al. 2017, Eq. 5).

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]).log()
        >>> y = torch.tensor([0, 1, 1, 1])  # half right at 0.8, all right at 0.6
        >>> round(float(MaximumCalibrationError().of(logits, y)), 4)
        0.4
    """

    def value(self, sums: Tensor) -> Tensor:
        count, confidence, correct = sums.unbind(-1)
        error = ((correct - confidence) / count.clamp(min=1)).abs().amax(-1)
        return error.where(count.sum(-1) > 0, torch.nan)


class ConfidenceHistogram(LevelMetric):
    """Base class of metrics of the order of confidences: 4096 cells of log-odds, 98 kB of sums for each level."""

    def __init__(self, num_levels: int = 1, **kwargs: object):
        super().__init__((_CELLS,), 3, num_levels, **kwargs)

    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        confidence, correct = _confidence_and_correct(logits, y)
        # log p/(1 − p) from the logits of the other classes, since 1 − p itself rounds to 0 near 1.
        largest, prediction = logits.double().max(1, keepdim=True)
        odds = largest - logits.double().scatter(1, prediction, -torch.inf).logsumexp(1, keepdim=True)
        cell = ((odds - _LOWEST) * (_CELLS / (_HIGHEST - _LOWEST))).nan_to_num(nan=0).clamp(0, _CELLS - 1).long()
        return cell, torch.ones_like(confidence), confidence, correct


class AdaptiveCalibrationError(ConfidenceHistogram):
    """ECE of the largest softmax probability with bins of equal mass (Nguyen & O'Connor 2015; Nixon et al. 2019).

    Every bin holds N/num_bins samples in the order of their confidence, that of the histogram; a sample at an edge is divided.
    Sorting them differs by 0.16/√N at most, and 0.001 on average for 2,000 samples.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]).log()
        >>> y = torch.tensor([0, 1, 1, 1])  # half right at 0.8, all right at 0.6
        >>> round(float(AdaptiveCalibrationError(num_bins=2).of(logits, y)), 4)  # (0.3 + 0.4)/2
        0.35
    """

    def __init__(self, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__(num_levels, **kwargs)
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        self.num_bins = num_bins

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(_equal_mass(sums, self.num_bins))


class ClasswiseCalibrationError(LevelMetric):
    """Mean over classes k of the ECE of p(k|x) against [k = y], with equal-width bins.

    Also called static calibration error (Kull et al. 2019; Nixon et al. 2019). The papers have 15 bins.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> round(float(ClasswiseCalibrationError(num_classes=2).of(logits, torch.tensor([0, 1]))), 4)  # of both 0.3
        0.3
    """

    def __init__(self, num_classes: int, num_bins: int = 15, num_levels: int = 1, **kwargs: object):
        super().__init__((num_classes, num_bins), 3, num_levels, **kwargs)
        self.num_classes, self.num_bins = num_classes, num_bins

    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the logits have shape {tuple(logits.shape)}")
        p = logits.double().softmax(1)
        cell = self.num_bins * torch.arange(p.shape[1], device=p.device) + equal_width_bin(p, self.num_bins)
        return cell, torch.ones_like(p), p, torch.zeros_like(p).scatter(1, y[:, None], 1.0)

    def value(self, sums: Tensor) -> Tensor:
        return calibration_error_from_bins(sums).mean(-1)


class SmoothCalibrationError(LevelMetric):
    """Kernel smooth ECE of the largest softmax probability (Błasiok & Nakkiran 2023, https://arxiv.org/abs/2309.12236).

    smECE = ∫ |r̂_σ| at the width σ where it equals σ. r̂_σ(t) is the mean over samples of
    K_σ(t, confidence)·(correct − confidence), K_σ the Gaussian reflected at 0 and 1. Unlike the binned errors it is continuous
    in the confidences and has no number of bins to choose. Confidences are divided between the points of a grid of step 0.001,
    which is also the smallest σ (16 kB of sums for each level).

    The authors' package, relplot, needs every confidence at once, and gives those of exactly 1 (or 0) half their weight.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2]]).log().repeat(10, 1)
        >>> y = torch.tensor([0] * 8 + [1] * 2)  # 8 of 10 right at a confidence of 0.8
        >>> round(float(SmoothCalibrationError().of(logits, y)), 2)
        0.0
    """

    def __init__(self, num_levels: int = 1, **kwargs: object):
        super().__init__((_POINTS,), 2, num_levels, **kwargs)

    def terms(self, logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Count and residual of each sample, divided between the two points of the grid around its confidence."""
        confidence, correct = _confidence_and_correct(logits, y)
        position = confidence * (_POINTS - 1)
        left = position.floor().long().clamp(0, _POINTS - 2)
        right_share = position - left
        shares = torch.cat([1 - right_share, right_share], dim=1)
        return torch.cat([left, left + 1], dim=1), shares, shares * (correct - confidence)

    def value(self, sums: Tensor) -> Tensor:
        count, residual = sums[..., 0].sum(-1), sums[..., 1]
        # Reflection at 0 and 1 is an even, periodic continuation, in which a Gaussian only damps the frequencies.
        ends, inner = residual[..., [0, -1]] * 2, residual[..., 1:-1]
        mirrored = torch.cat([ends[..., :1], inner, ends[..., 1:], inner.flip(-1)], dim=-1)
        spectrum = torch.fft.rfft(mirrored)
        frequency = torch.pi * torch.arange(_POINTS, dtype=sums.dtype, device=sums.device)

        def error_at(width: Tensor) -> Tensor:
            damped = spectrum * (-(width[..., None] * frequency).square() / 2).exp()
            smoothed = torch.fft.irfft(damped, n=2 * (_POINTS - 1))[..., :_POINTS].abs()
            return (smoothed.sum(-1) - smoothed[..., [0, -1]].sum(-1) / 2) / count

        low, high = torch.full_like(count, 1 / (_POINTS - 1)), torch.ones_like(count)
        for _ in range(_BISECTIONS):
            width = (low + high) / 2
            above = error_at(width) > width
            low, high = torch.where(above, width, low), torch.where(above, high, width)
        return error_at(low)
