"""CFG++ (Chung et al. 2024, arXiv 2406.08070)."""

from __future__ import annotations

from torch import Tensor

from calib_guidance.denoisers.rules.base import Level, Rule


class CFGPlusPlus(Rule):
    """x̂0 = x̂0_u + λ·(x̂0_c − x̂0_u), renoised with ε_u: a step of DDIM is x' = √ᾱ'·x̂0 + √(1−ᾱ')·ε_u.

    Needs a sampler that takes the noise from another prediction: DDIM (Euler's method, with η = 1 its ancestral variant) or
    DPMSolver. For DDIM it is classifier-free guidance of the weight λ·σ/(σ − σ'), which grows with the number of steps. At λ = 1
    x̂0 is the conditional prediction and the noise still the negative one: conditional sampling is ClassifierFreeGuidance with
    weight 1. Defined on x̂0 and ε alike.

    Args:
        weight: λ in [0, 1], which does what weights from 1 to 12.5 do; 0 samples the negative alone.
    """

    renoises_with_negative = True

    def __init__(self, weight: float = 0.6):
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of CFG++ interpolates and must be between 0 and 1, got {weight}")
        self.weight = weight

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        return x0_uncond + self.weight * (x0_cond - x0_uncond)
