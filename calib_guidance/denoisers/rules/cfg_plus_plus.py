"""CFG++ (Chung et al. 2024, arXiv 2406.08070)."""

from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance


class CFGPlusPlus(ClassifierFreeGuidance):
    """CFG++: classifier-free guidance that renoises with the negative prediction.

    x̂0 = x̂0_u + λ·(x̂0_c − x̂0_u), renoised with ε_u: a step of DDIM is x' = √ᾱ'·x̂0 + √(1−ᾱ')·ε_u.

    Needs a sampler that takes the noise from another prediction: DDIM (Euler's method, with η = 1 its ancestral variant) or
    DPMSolver. For DDIM it is classifier-free guidance of the weight λ·σ/(σ − σ'), which grows with the number of steps. At λ = 1
    the noise is still the negative one: conditional sampling is ClassifierFreeGuidance with weight 1.

    Args:
        weight: λ in [0, 1], which does what weights from 1 to 12.5 do; 0 samples the negative alone.

    Examples:
        >>> import torch
        >>> from calib_guidance.denoisers import Level
        >>> rule = CFGPlusPlus(weight=0.5)
        >>> rule(torch.tensor(2.0), torch.tensor(1.0), Level(*torch.zeros(5)), {}), rule.renoises_with_negative
        (tensor(1.5000), True)
    """

    renoises_with_negative = True

    def __init__(self, weight: float = 0.6):
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of CFG++ interpolates and must be between 0 and 1, got {weight}")
        super().__init__(weight)
