"""CFG-Zero* (Fan et al. 2025, arXiv 2503.18886)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, inner


class CFGZeroStar(ConvertedRule):
    """CFG-Zero*: classifier-free guidance from the multiple of the negative that is closest to the conditional prediction.

    s·u + w·(c − s·u) with s = ⟨c, u⟩/(‖u‖² + 1e-8), the multiple of u closest to c.

    Where c is parallel to u this is c for every w. The source's other half, a zero velocity in the first steps, is ``zero_steps``
    of :class:`~calib_guidance.samplers.FlowODE`.

    Args:
        weight: w; 1 is the conditional prediction.
        representation: ``v`` as in the source, ``epsilon`` or ``x0``.

    Examples:
        >>> import torch
        >>> cond, uncond = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 1, 2)
        >>> CFGZeroStar(weight=3.0).combine(cond, uncond, {}).flatten()  # parallel to u: c for every w
        tensor([2., 0.])
    """

    def __init__(self, weight: float = 1.5, representation: Representation = "v"):
        super().__init__(weight, representation)

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        scale = inner(cond, uncond) / (inner(uncond, uncond) + 1e-8)
        scaled = scale.to(uncond.dtype) * uncond
        return scaled + self.weight * (cond - scaled)
