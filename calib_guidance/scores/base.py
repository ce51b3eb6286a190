"""What every score is, and the plain one: tempered log-probability."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.errors import check_numbers


def as_float(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: scores and their gradients are never computed in half precision."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def log_softmax(logits: Tensor) -> Tensor:
    """log p of p = softmax(f), ``(N, K)`` in float32 or wider, whose gradients stay exact where the classifier is sure.

    With m the most likely class and u = logsumexp_{j≠m} f_j − f_m: log p_m = −softplus(u), log p_j = f_j − logsumexp_{i≠m} f_i −
    softplus(−u). PyTorch's own gradient holds 1 − p_m, which float32 rounds to 0 from log-odds of 16.6 on.
    """
    logits = as_float(logits)
    most_likely = logits.argmax(dim=1, keepdim=True)
    is_most_likely = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, most_likely, True)
    others = logits.masked_fill(is_most_likely, -math.inf)
    rest = others.logsumexp(dim=1, keepdim=True)
    u = rest - logits.gather(1, most_likely)
    return torch.where(is_most_likely, F.logsigmoid(-u), others - rest + F.logsigmoid(u))


class Score(nn.Module, ABC):
    """Base class of scores: one value per sample that guidance climbs, ``score(logits, y, time) -> (N,)``.

    Guidance climbs its gradient. ``logits`` are ``(N, K)``, ``y`` ``(N,)``; ``time`` is the fraction of the trajectory still to
    go, from 1 at pure noise to 0 at the image, which only scores with a schedule use.

    ``group_size`` is the number of neighboring samples whose scores depend on each other.

    Examples:
        >>> class Margin(Score):  # a score of your own
        ...     def forward(self, logits, y, time=1.0):
        ...         others = logits.scatter(1, y[:, None], -torch.inf)
        ...         return logits.gather(1, y[:, None]).squeeze(1) - others.amax(1)
        >>> Margin()(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([2.])
    """

    group_size: int = 1

    @abstractmethod
    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor: ...


class TemperedLogProb(Score):
    """Tempered log-probability.

    log p_{τ1,τ2}(y|x) = τ1·f_y − logsumexp(τ2·f) (arXiv 2310.11311 Eq. 4); τ1 = τ2 = 1 is plain classifier guidance.

    τ2 < τ1 strengthens the joint direction, which leads to the mode of the class, over the marginal one; τ2 = 0 leaves only
    the joint energy f_y.

    Args:
        tau1: joint temperature, > 0.
        tau2: marginal temperature, ≥ 0.

    Examples:
        >>> logits, y = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> round(float(TemperedLogProb()(logits, y)), 4)  # log softmax
        -0.2395
        >>> round(float(TemperedLogProb(tau2=0.0)(logits, y)), 4)  # the logit, less log 3
        0.9014
    """

    def __init__(self, tau1: float = 1.0, tau2: float = 1.0):
        super().__init__()
        check_numbers(above=0, tau1=tau1)
        check_numbers(least=0, tau2=tau2)
        self.tau1, self.tau2 = tau1, tau2

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        logits = as_float(logits)
        log_p, joint = log_softmax(self.tau2 * logits), (self.tau1 - self.tau2) * logits
        return (log_p + joint).gather(1, y[:, None]).squeeze(1)
