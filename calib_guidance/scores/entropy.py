"""Entropy-regularised score (arXiv 2511.05844)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from calib_guidance.errors import check_choice
from calib_guidance.scores.base import as_float
from calib_guidance.scores.log_prob import TemperedLogProb, tempered_log_prob

WEIGHTINGS = ("constant", "linear", "cosine", "confidence")


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p log p of p = softmax(f), in nats: ``(N, K)`` to ``(N,)`` in [0, log K]."""
    log_p = as_float(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def entropy_regularized(
    logits: Tensor, y: Tensor, weight: Tensor | float, tau1: float = 1.0, tau2: float = 1.0
) -> Tensor:
    """log p_{τ1,τ2}(y|x) + λ·H(p), with λ one number or one per sample; ``(N,)``."""
    return tempered_log_prob(logits, y, tau1, tau2) + weight * entropy(logits)


class EntropyRegularized(TemperedLogProb):
    """log p_{τ1,τ2}(y|x) + λ_t·H(p): rewards an undecided classifier, so that its gradient lasts.

    The paper calls λ_t adaptive without saying how; these are offered:

    - ``constant``: λ;
    - ``linear``, ``cosine``: from λ at the noisy end to 0 at the image;
    - ``confidence``: λ·(1 − H(p)/log K) per sample, without gradient: the more over-confident, the stronger the pull.

    Args:
        entropy_weight: λ, any finite number; negative sharpens instead.
        weighting: one of the above.
    """

    def __init__(self, entropy_weight: float = 0.1, weighting: str = "constant", *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_choice("weighting", weighting, WEIGHTINGS)
        if not math.isfinite(entropy_weight):
            raise ValueError(f"entropy_weight must be a finite number, got {entropy_weight}")
        self.entropy_weight, self.weighting = entropy_weight, weighting

    def weight(self, logits: Tensor, time: float) -> Tensor | float:
        """λ_t: one number, or ``(N,)`` for ``confidence``."""
        if self.weighting == "linear":
            return self.entropy_weight * time
        if self.weighting == "cosine":
            return self.entropy_weight * (1 - math.cos(math.pi * time)) / 2
        if self.weighting == "confidence":
            return self.entropy_weight * (1 - entropy(logits.detach()) / math.log(logits.shape[1]))
        return self.entropy_weight

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        return entropy_regularized(logits, y, self.weight(logits, time), self.tau1, self.tau2)
