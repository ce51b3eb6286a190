"""Magnitude-aware guidance, MAMBO-G (arXiv 2508.03442)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, norm
from calib_guidance.errors import check_numbers


class MAMBOG(ConvertedRule):
    """Magnitude-aware guidance (MAMBO-G).

    u + w'·(c − u) with w' = 1 + (w − 1)·exp(−α·‖c − u‖/‖u‖): the weight falls where the two predictions lie far apart.

    Args:
        weight: w; 1 is the conditional prediction.
        damping: α ≥ 0; 0 is classifier-free guidance.
        representation: ``v`` as in the source, ``epsilon`` or ``x0``.

    Examples:
        >>> import math, torch
        >>> cond, uncond = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
        >>> rule = MAMBOG(weight=3.0, damping=math.log(2))  # w' = 1 + 2·exp(−log 2) = 2
        >>> round(float(rule.combine(cond, uncond, {})), 4)
        3.0
    """

    def __init__(self, weight: float = 10.0, damping: float = 8.0, representation: Representation = "v"):
        super().__init__(weight, representation)
        check_numbers(least=0, damping=damping)
        self.damping = damping

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        difference = cond - uncond
        damped = (-self.damping * norm(difference) / norm(uncond)).exp()
        return uncond + (1 + (self.weight - 1) * damped).to(cond.dtype) * difference
