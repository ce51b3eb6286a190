"""Entropy- and divergence-regularized scores (arXiv 2511.05844).

A divergence is one function of (log q, log p), ``(N, K)`` each, giving D(q, p) = Σ q·φ(p/q), ``(N,)``. To add one, write it
here under its name in ``DIVERGENCES``. Log space keeps saturated classifiers exact.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.scores.base import TemperedLogProb, as_float, log_softmax

Weighting = Literal["constant", "linear", "cosine", "confidence"]


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p log p of p = softmax(f), in nats: ``(N, K)`` to ``(N,)`` in [0, log K].

    Examples:
        >>> entropy(torch.zeros(1, 4)).exp()  # of a uniform p, K
        tensor([4.])
    """
    log_p = log_softmax(logits)
    return -(log_p.exp() * log_p).sum(dim=1)


class EntropyRegularized(TemperedLogProb):
    """Log-probability with an entropy bonus.

    log p_{τ1,τ2}(y|x) + λ_t·H(p): rewards an undecided classifier, so that its gradient lasts.

    The paper calls λ_t adaptive without saying how; these are offered:

    - ``constant``: λ;
    - ``linear``, ``cosine``: from λ at the noisy end to 0 at the image;
    - ``confidence``: λ·(1 − H(p)/log K) per sample, without gradient: the more over-confident, the stronger the pull.

    Args:
        entropy_weight: λ, any finite number; negative sharpens instead.
        weighting: one of the above.

    Examples:
        >>> logits, y = torch.zeros(1, 4), torch.tensor([0])
        >>> score = EntropyRegularized(entropy_weight=1.0)(logits, y)  # -log 4 + log 4
        >>> round(abs(float(score)), 6)
        0.0
    """

    def __init__(self, entropy_weight: float = 0.1, weighting: Weighting = "constant", *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_choice("weighting", weighting, get_args(Weighting))
        check_numbers(entropy_weight=entropy_weight)
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
        return super().forward(logits, y) + self.weight(logits, time) * entropy(logits)


def _entropy_term(log_p: Tensor) -> Tensor:
    """p·log p, 0 where p is 0."""
    p = log_p.exp()
    return torch.xlogy(p, p) if not log_p.requires_grad else p * log_p


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q‖p), φ(u) = −log u: mode covering; its gradient in logit space is p − q."""
    return (_entropy_term(log_q) - log_q.exp() * log_p).sum(dim=1)


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p‖q), φ(u) = u·log u: mode seeking, the highest precision and the lowest recall."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    """½KL(q‖m) + ½KL(p‖m) with m = ½(p + q): balanced, at most log 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_q = _entropy_term(log_q) - log_q.exp() * log_m
    from_p = log_p.exp() * (log_p - log_m)
    return 0.5 * (from_q + from_p).sum(dim=1)


def hellinger(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Σ(√p − √q)² = 2 − 2Σ√(pq), φ(u) = (√u − 1)², at most 2."""
    return 2 - 2 * (0.5 * (log_p + log_q)).exp().sum(dim=1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rkl": reverse_kl,
    "fkl": forward_kl,
    "js": jensen_shannon,
    "hellinger": hellinger,
}


@functools.lru_cache(maxsize=8)
def _targets_log(num_classes: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """log q_y of every class y, ``(K, K)``: made once, not at every step."""
    with torch.inference_mode(False):  # tensors of inference mode could not be part of a gradient later
        q = torch.full((num_classes, num_classes), (1 - epsilon) / num_classes, dtype=dtype, device=device)
        return q.fill_diagonal_((1 - epsilon) / num_classes + epsilon).log()


def smoothed_one_hot_log(y: Tensor, num_classes: int, epsilon: float, dtype: torch.dtype) -> Tensor:
    """log q_y with q_y(i) = (1−ε)/K + ε·[i = y], ``(N, K)``; ε = 1 gives −∞ off the class."""
    return _targets_log(num_classes, epsilon, dtype, y.device)[y]


class DivergenceRegularized(TemperedLogProb):
    """Log-probability with a divergence penalty.

    log p_{τ1,τ2}(y|x) − α·D(q_y, p), p at temperature 1: pulls the prediction toward a softened one-hot target.

    Args:
        divergence: ``rkl``, ``fkl``, ``js`` or ``hellinger``.
        alpha: weight α ≥ 0; 0.05 … 0.15 in the paper.
        epsilon: ε in (0, 1) of the target q_y = (1−ε)/K + ε·[i = y]: near 0 uniform, near 1 one-hot. The paper gives no value. It
            calls q_y label-smoothed, and derives for reverse KL a target direction of τ1 + αε and a diversity term of α(1−ε)/K
            per class, so ε is read as near 1. Near 0 the divergence pulls against the class as soon as p_y > q_y.

    Examples:
        >>> logits = torch.tensor([[0.9 + 0.1 / 2, 0.1 / 2]]).log()  # p is the target q of class 0
        >>> score = DivergenceRegularized("js", alpha=1.0, epsilon=0.9)
        >>> round(float(score(logits, torch.tensor([0]))), 4)  # log 0.95, and no divergence
        -0.0513
    """

    def __init__(self, divergence: str = "js", alpha: float = 0.1, epsilon: float = 0.9, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_choice("divergence", divergence, DIVERGENCES)
        check_numbers(least=0, alpha=alpha)
        check_numbers(above=0, below=1, epsilon=epsilon)
        self.divergence, self.alpha, self.epsilon = divergence, alpha, epsilon

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        logits = as_float(logits)
        log_q = smoothed_one_hot_log(y, logits.shape[1], self.epsilon, logits.dtype)
        return super().forward(logits, y) - self.alpha * DIVERGENCES[self.divergence](log_q, log_softmax(logits))
