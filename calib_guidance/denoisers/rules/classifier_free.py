"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.errors import check_numbers


class ClassifierFreeGuidance(Rule):
    """Classifier-free guidance.

    x̂0 = x̂0_u + w·(x̂0_c − x̂0_u), which is ε_u + w·(ε_c − ε_u) in ε and likewise in v.

    Args:
        weight: w; 1 is the conditional prediction, 0 the negative one.

    Examples:
        >>> level = Level(*torch.zeros(5))  # not used by this rule
        >>> ClassifierFreeGuidance(weight=3.0)(torch.tensor(2.0), torch.tensor(1.0), level, {})
        tensor(4.)
    """

    def __init__(self, weight: float = 1.5):
        super().__init__()
        check_numbers(weight=weight)
        self.weight = weight

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        return x0_uncond + self.weight * (x0_cond - x0_uncond)
