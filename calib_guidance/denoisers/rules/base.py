"""What a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Level(NamedTuple):
    """Where a rule is applied.

    Attributes:
        x_t: ``(N, C, H, W)`` noisy images, to convert x̂0 to ε or v.
        t: step of the full process.
        alphas_cumprod: ᾱ.
        sigma: √(1/ᾱ − 1).

    The last three are float32 scalars, or ``(N, 1, 1, 1)`` where samples have steps of their own.
    """

    x_t: Tensor
    t: Tensor
    alphas_cumprod: Tensor
    sigma: Tensor


class Rule(nn.Module, ABC):
    """How a conditional prediction and a negative one become one: ``rule(x0_cond, x0_uncond, level, state) -> x0``."""

    @abstractmethod
    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        """Combined x̂0 ``(N, C, H, W)``.

        Args:
            x0_cond, x0_uncond: ``(N, C, H, W)``, not clipped.
            level: noise level and x_t.
            state: tensors ``(N, …)`` that the rule keeps from step to step of one trajectory; empty at its start.
        """
