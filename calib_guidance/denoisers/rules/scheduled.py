"""Weight schedules: any rule, stronger or weaker along the trajectory (Wang et al. 2024, arXiv 2404.13040)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers

Shape = Literal["linear", "cosine", "exponential"]


class Scheduled(Rule):
    """A rule with a weight schedule.

    c + f(s)·(rule(c, u) − c): f multiplies w − 1 of classifier-free guidance, so that f = 0 is the conditional prediction.

    s is the fraction of steps done, from 0 at noise to 1. ``linear`` is f = 2s and ``cosine`` 1 − cos πs, which both rise
    and have mean 1; ``exponential`` is exp(−λ·(1 − s)), 1 at the end (C²FG, arXiv 2603.08155: exp(−λt)). Intervals are options
    of :class:`~calib_guidance.denoisers.combination.Combination`. For a learned or another curve override :meth:`factor`.

    Args:
        rule: what is scheduled; classifier-free guidance by default. On x̂0 as far as f goes, which is linear.
        shape: ``linear``, ``cosine`` or ``exponential``.
        minimum: f is at least this (the source's clamped schedules).
        decay: λ ≥ 0 of ``exponential``.

    Examples:
        >>> rule = Scheduled(ClassifierFreeGuidance(3.0), shape="linear")
        >>> level = Level(*torch.zeros(4), progress=torch.tensor(0.25))  # f = 2·0.25
        >>> rule(torch.tensor(2.0), torch.tensor(1.0), level, {})  # 2 + 0.5·(4 − 2)
        tensor(3.)
    """

    def __init__(self, rule: Rule | None = None, shape: Shape = "linear", minimum: float = 0.0, decay: float = 1.0):
        super().__init__()
        check_choice("shape", shape, get_args(Shape))
        check_numbers(minimum=minimum)
        check_numbers(least=0, decay=decay)
        self.rule, self.shape, self.minimum, self.decay = rule or ClassifierFreeGuidance(), shape, minimum, decay
        if self.rule.renoises_with_negative:
            raise ValueError("CFG++ has a weight for each step already, λ·σ/(σ − σ'): schedule another rule")
        self.looks_at_steps = self.rule.looks_at_steps

    def factor(self, level: Level) -> Tensor:
        """f at a level: a number or ``(N, 1, 1, 1)``."""
        s = level.progress
        if self.shape == "linear":
            return 2 * s
        return 1 - torch.cos(math.pi * s) if self.shape == "cosine" else torch.exp(-self.decay * (1 - s))

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        factor = self.factor(level).clamp(min=self.minimum)
        return x0_cond + factor * (self.rule(x0_cond, x0_uncond, level, state) - x0_cond)

    def start(self, levels: NoiseLevels, y: Tensor) -> dict[str, Tensor]:
        return self.rule.start(levels, y)

    def after_step(self, level: Level, state: dict[str, Tensor]) -> None:
        self.rule.after_step(level, state)
