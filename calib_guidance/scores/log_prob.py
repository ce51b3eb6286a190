"""Tempered log-probability (arXiv 2310.11311 Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_guidance.scores.base import Score, as_float


def tempered_log_prob(logits: Tensor, y: Tensor, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """τ1·f_y − logsumexp(τ2·f), ``(N,)`` from logits ``(N, K)`` and classes ``(N,)``."""
    logits = as_float(logits)
    return tau1 * logits.gather(1, y[:, None]).squeeze(1) - torch.logsumexp(tau2 * logits, dim=1)


class TemperedLogProb(Score):
    """log p_{τ1,τ2}(y|x); τ1 = τ2 = 1 is plain classifier guidance.

    τ2 < τ1 strengthens the joint direction, which leads to the mode of the class, over the marginal one; τ2 = 0 leaves only
    the joint energy f_y.

    Args:
        tau1: joint temperature, > 0.
        tau2: marginal temperature, ≥ 0.
    """

    def __init__(self, tau1: float = 1.0, tau2: float = 1.0):
        super().__init__()
        if not (math.isfinite(tau1) and tau1 > 0):
            raise ValueError(f"tau1 (joint temperature) must be a number above 0, got {tau1}")
        if not (math.isfinite(tau2) and tau2 >= 0):
            raise ValueError(f"tau2 (marginal temperature) must be a number of at least 0, got {tau2}")
        self.tau1, self.tau2 = tau1, tau2

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        return tempered_log_prob(logits, y, self.tau1, self.tau2)
