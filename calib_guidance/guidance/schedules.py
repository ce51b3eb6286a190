"""How strong classifier guidance is at each step, and where it is off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from calib_guidance.diffusion.interval import Interval


@final
class GuidanceSchedule(Interval):
    """Sine amplification, and where guidance is off: its classifier is not run there.

    Args:
        gamma: γ ≥ 0, the sine factor (0.3 in arXiv 2310.11311, Table 6): adds γ·sin(π·progress) to the strength, in the units
            of the sampler (DDPM: times the largest variance so far). Progress is i/N at spaced step i of N of DDPM.
        interval, sigma_interval, step_interval: see :class:`~calib_guidance.diffusion.interval.Interval`.
        every: guide the first step and every so many-th after it. Between them nothing stands in for the gradient, so that
            the total strength falls with it.

    Raises:
        ValueError: γ < 0, an interval that is not two ascending numbers, or ``every`` below 1.
    """

    def __init__(
        self,
        gamma: float = 0.0,
        interval: Sequence[float] | None = None,
        sigma_interval: Sequence[float] | None = None,
        every: int = 1,
        step_interval: Sequence[int] | None = None,
    ):
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a number of at least 0, got {gamma}")
        super().__init__(interval, sigma_interval, every, step_interval)
        self.gamma = gamma

    def sine(self, progress: float) -> float:
        """γ·sin(π·progress), see :class:`~calib_guidance.diffusion.schedules.NoiseLevels`."""
        return self.gamma * math.sin(math.pi * progress)
