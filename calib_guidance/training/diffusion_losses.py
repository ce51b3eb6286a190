"""Training losses of diffusion models (Ho et al. 2020; Nichol & Dhariwal 2021, "Improved DDPM")."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) of independent normals, elementwise, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2).square() * torch.exp(-log_variance2)
    )


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood, elementwise and in nats, of 8-bit images scaled to [-1, 1] under a rounded normal."""
    inverse_std = torch.exp(-0.5 * log_variance)

    def cdf(z: Tensor) -> Tensor:
        return torch.special.ndtr(z * inverse_std)

    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x - mean + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - mean - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log()


def variational_bound_term(
    x0: Tensor,
    true_mean: Tensor,
    true_log_variance: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    is_first_step: Tensor,
) -> Tensor:
    """One term of the variational bound per sample, in bits per dimension.

    Args:
        x0, true_mean, mean, log_variance: ``(N, C, H, W)``; true_log_variance broadcasts to them.
        is_first_step: ``(N,)`` bool, where the term is the decoder's likelihood instead of a divergence.

    Returns:
        ``(N,)``.
    """
    divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    likelihood = discretised_gaussian_nll(x0, mean, log_variance).flatten(1).mean(1)
    return torch.where(is_first_step, likelihood, divergence) / math.log(2)
