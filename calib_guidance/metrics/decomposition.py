"""Negative log-likelihood and Brier score, split into calibration and what is left of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.classifiers.temperature import fit_temperature
from calib_guidance.training.losses import equal_width_bin


class LikelihoodSplit(NamedTuple):
    """Scalars float64, in nats: nll = calibration + refinement."""

    nll: Tensor
    calibration: Tensor  # what recalibration removes
    refinement: Tensor  # NLL after it
    temperature: Tensor


def split_nll(logits: Tensor, y: Tensor, fitted_on: tuple[Tensor, Tensor] | None = None) -> LikelihoodSplit:
    """Split the NLL by the best temperature.

    Args:
        logits, y: ``(N, K)`` and ``(N,)``, to measure on.
        fitted_on: logits and classes of other samples to fit the temperature on; None takes the same, where calibration is at
            least 0 and too large by the fit of one number.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2]] * 5).log()
        >>> split = split_nll(3 * logits, torch.tensor([0, 0, 0, 0, 1]))  # four of five are right: 0.8 is calibrated
        >>> round(float(split.temperature), 3), round(float(split.refinement), 4)  # the entropy of (0.8, 0.2)
        (3.0, 0.5004)
    """
    temperature = fit_temperature(*(fitted_on or (logits, y)))[0]
    nll = F.cross_entropy(logits.double(), y)
    refinement = F.cross_entropy(logits.double() / temperature, y)
    return LikelihoodSplit(nll, nll - refinement, refinement, temperature)


class BrierSplit(NamedTuple):
    """Scalars float64: Brier score of confidence = reliability − resolution + uncertainty + within-bin terms."""

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bins: Tensor  # variance of confidence less twice its covariance with being right


def split_brier(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> BrierSplit:
    """Murphy's split of the mean of (confidence − correct)², exact with bins of finite width (Stephenson et al. 2008).

    Args:
        confidence: ``(N,)`` in [0, 1].
        correct: ``(N,)``, 1 where the prediction is right, else 0.
        num_bins: equal-width bins.
    """
    p, a = confidence.double(), correct.double()
    bins, sums = equal_width_bin(p, num_bins), torch.zeros(num_bins, 3, dtype=torch.float64, device=p.device)
    sums = sums.index_add(0, bins, torch.stack([torch.ones_like(p), p, a], 1))
    count = sums[:, 0].clamp(min=1)
    weight, mean_p, mean_a = sums[:, 0] / len(p), sums[:, 1] / count, sums[:, 2] / count
    base = a.mean()
    off_p, off_a = p - mean_p[bins], a - mean_a[bins]
    return BrierSplit(
        brier=(p - a).square().mean(),
        reliability=(weight * (mean_p - mean_a).square()).sum(),
        resolution=(weight * (mean_a - base).square()).sum(),
        uncertainty=base * (1 - base),
        within_bins=(off_p.square() - 2 * off_p * off_a).mean(),
    )
