"""Kernel smooth expected calibration error (Błasiok & Nakkiran 2023, https://arxiv.org/abs/2309.12236)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.metrics.calibration import confidence_and_correct
from calib_guidance.metrics.levels import LevelMetric, Terms, add_up

_POINTS = 1001
_BISECTIONS = 20


def _grid_terms(logits: Tensor, y: Tensor) -> Terms:
    """Count and residual of each sample, divided between the two points of the grid around its confidence."""
    confidence, correct = confidence_and_correct(logits, y)
    position = confidence * (_POINTS - 1)
    left = position.floor().long().clamp(0, _POINTS - 2)
    right_share = position - left
    shares = torch.stack([1 - right_share, right_share], dim=1)
    return Terms(torch.stack([left, left + 1], dim=1), (shares, shares * (correct - confidence)[:, None]))


def _smooth_error(grid: Tensor) -> Tensor:
    """smECE of counts and residuals ``(…, points, 2)`` on a grid of [0, 1]; NaN where nothing was counted."""
    points = grid.shape[-2]
    count, residual = grid[..., 0].sum(-1), grid[..., 1]
    # Reflection at 0 and 1 is an even, periodic continuation, in which a Gaussian only damps the frequencies.
    ends, inner = residual[..., [0, -1]] * 2, residual[..., 1:-1]
    mirrored = torch.cat([ends[..., :1], inner, ends[..., 1:], inner.flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(mirrored)
    frequency = torch.pi * torch.arange(points, dtype=grid.dtype, device=grid.device)

    def error_at(width: Tensor) -> Tensor:
        damped = spectrum * (-(width[..., None] * frequency).square() / 2).exp()
        smoothed = torch.fft.irfft(damped, n=2 * (points - 1))[..., :points].abs()
        return (smoothed.sum(-1) - smoothed[..., [0, -1]].sum(-1) / 2) / count

    low, high = torch.full_like(count, 1 / (points - 1)), torch.ones_like(count)
    for _ in range(_BISECTIONS):
        width = (low + high) / 2
        above = error_at(width) > width
        low, high = torch.where(above, width, low), torch.where(above, high, width)
    return error_at(low)


def smooth_calibration_error(logits: Tensor, y: Tensor) -> Tensor:
    """smECE of the largest softmax probability: ∫ |r̂_σ| at the width σ where it equals σ.

    r̂_σ(t) is the mean over samples of K_σ(t, confidence)·(correct − confidence), K_σ the Gaussian reflected at 0 and 1.
    Unlike the binned errors it is continuous in the confidences and has no number of bins to choose.
    Confidences are divided between the points of a grid of step 0.001, which is also the smallest σ.

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.

    Returns:
        Scalar float64 in [0, 1].
    """
    return _smooth_error(add_up(_grid_terms(logits, y), _POINTS))


class SmoothCalibrationError(LevelMetric):
    """:func:`smooth_calibration_error`.

    Not through relplot, the authors' package, which the tests compare with: it needs every confidence at once, and gives
    those of exactly 1 (or 0) half their weight. Keeps 16 kB of sums for each level.

    Args:
        num_levels: noise levels.
    """

    def __init__(self, num_levels: int = 1, **kwargs: object):
        super().__init__((_POINTS,), 2, num_levels, **kwargs)

    def terms(self, logits: Tensor, y: Tensor) -> Terms:
        return _grid_terms(logits, y)

    def value(self, sums: Tensor) -> Tensor:
        return _smooth_error(sums)
