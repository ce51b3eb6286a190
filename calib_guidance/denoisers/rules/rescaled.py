"""Rescaled classifier-free guidance (Lin et al. 2023, arXiv 2305.08891)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, ratio
from calib_guidance.errors import check_numbers


class RescaledGuidance(ConvertedRule):
    """Rescaled classifier-free guidance.

    φ·g·std(c)/std(g) + (1 − φ)·g with g = u + w·(c − u); std over channels and pixels of each sample.

    Keeps the guided prediction from growing with w, which over-exposes images.

    Args:
        weight: w; 1 is the conditional prediction.
        rescale: φ in [0, 1]; 0 is classifier-free guidance. The source uses 0.7.
        representation: ``epsilon``, ``v`` for flow models, as the source rescales the output of the network, or ``x0``.

    Examples:
        >>> import torch
        >>> cond, uncond = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> guided = RescaledGuidance(weight=7.5, rescale=1.0).combine(cond, uncond, {})  # 7.5·c, at the std of c
        >>> [round(value, 4) for value in guided.flatten().tolist()]
        [1.0, -1.0]
    """

    def __init__(self, weight: float = 7.5, rescale: float = 0.7, representation: Representation = "epsilon"):
        super().__init__(weight, representation)
        check_numbers(least=0, most=1, rescale=rescale)
        self.rescale = rescale

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        guided = uncond + self.weight * (cond - uncond)
        std, std_cond = (value.std(dim=(1, 2, 3), keepdim=True) for value in (guided, cond))
        return guided * (self.rescale * ratio(std_cond, std) + 1 - self.rescale)
