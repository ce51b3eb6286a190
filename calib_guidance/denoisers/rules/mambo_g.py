"""Magnitude-aware guidance, MAMBO-G (arXiv 2508.03442)."""

from __future__ import annotations

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, check_finite, norm


class MAMBOG(ConvertedRule):
    """u + w'·(c − u) with w' = 1 + (w − 1)·exp(−α·‖c − u‖/‖u‖): the weight falls where the two predictions lie far apart.

    Args:
        weight: w; 1 is the conditional prediction.
        damping: α ≥ 0; 0 is classifier-free guidance.
        representation: ``v`` as in the source, ``epsilon`` or ``x0``.
    """

    def __init__(self, weight: float = 10.0, damping: float = 8.0, representation: Representation = "v"):
        super().__init__(representation)
        check_finite(weight=weight, damping=damping)
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}")
        self.weight, self.damping = weight, damping

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        difference = cond - uncond
        damped = (-self.damping * norm(difference) / norm(uncond)).exp()
        return uncond + (1 + (self.weight - 1) * damped).to(cond.dtype) * difference
