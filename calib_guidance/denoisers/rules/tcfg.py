"""Tangential damping classifier-free guidance, TCFG (Kwon et al. 2025, arXiv 2503.18137)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, inner, ratio


class TCFG(ConvertedRule):
    """Tangential damping classifier-free guidance (TCFG).

    ũ + w·(c − ũ), ũ the projection of u on r, the leading right singular vector of the 2×D matrix with the rows c and u.

    Drops what u has across the direction that both predictions share. Where u = ±c this is classifier-free guidance.

    Args:
        weight: w; 1 is the conditional prediction.
        representation: ``epsilon`` as in the source, ``v`` or ``x0``.

    Examples:
        >>> cond, uncond = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 1, 2)
        >>> TCFG(weight=3.0).combine(cond, uncond, {}).flatten()  # parallel: ũ = u, and u + 3·(c − u)
        tensor([4., 0.])
    """

    def __init__(self, weight: float = 7.5, representation: Representation = "epsilon"):
        super().__init__(weight, representation)

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        # r = cos(θ)·c + sin(θ)·u, the leading eigenvector of their 2×2 Gram matrix.
        mixed = inner(cond, uncond)
        theta = torch.atan2(2 * mixed, inner(cond, cond) - inner(uncond, uncond)) / 2
        r = theta.cos().to(cond.dtype) * cond + theta.sin().to(cond.dtype) * uncond
        damped = ratio(inner(uncond, r), inner(r, r)).to(r.dtype) * r
        return damped + self.weight * (cond - damped)
