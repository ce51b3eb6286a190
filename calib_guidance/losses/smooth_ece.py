"""Smooth expected calibration error, a loss that makes confidence match accuracy (arXiv 2511.05844 Eq. 1)."""

from __future__ import annotations

from torch import Tensor


def smooth_ece(logits: Tensor, y: Tensor, beta: float = 1e-2) -> Tensor:
    """Mean of √((p̂ − a)² + β) over samples, a smooth form of |p̂ − a|.

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` true classes.
        beta: smoothing, > 0; the loss lies in [√β, √(1 + β)].

    Returns:
        Scalar. p̂ is the largest softmax probability; a, whether its class is the true one, is a constant to the
        gradient.
    """
    confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
    correct = (prediction == y).to(confidence.dtype)
    return ((confidence - correct).square() + beta).sqrt().mean()
