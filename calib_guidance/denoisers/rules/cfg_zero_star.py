"""CFG-Zero* (Fan et al. 2025, arXiv 2503.18886)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, inner


class CFGZeroStar(ConvertedRule):
    """s·u + w·(c − s·u) with s = ⟨c, u⟩/(‖u‖² + 1e-8), the multiple of u closest to c.

    Where c is parallel to u this is c for every w. (The source's other half, a zero velocity in the first steps, skips moves of a
    flow sampler and combines nothing.)

    Args:
        weight: w; 1 is the conditional prediction.
        representation: ``v`` as in the source, ``epsilon`` or ``x0``.
    """

    def __init__(self, weight: float = 1.5, representation: Representation = "v"):
        super().__init__(weight, representation)

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        scale = inner(cond, uncond) / (inner(uncond, uncond) + 1e-8)
        scaled = scale.to(uncond.dtype) * uncond
        return scaled + self.weight * (cond - scaled)
