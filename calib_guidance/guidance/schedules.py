"""How strong guidance is at each step, and where it is off."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calib_guidance.noise_schedule import NoiseLevels


def _check_interval(name: str, interval: Sequence[float] | None) -> tuple[float, ...] | None:
    if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
        raise ValueError(f"{name} must be [low, high] with low ≤ high, got {list(interval)}")
    return None if interval is None else tuple(interval)


class GuidanceSchedule:
    """Sine amplification, and where guidance is off: its classifier is not run there.

    Args:
        gamma: γ ≥ 0, the sine factor (0.3 in arXiv 2310.11311, Table 6): adds γ·sin(π·progress) to the strength, in the units
            of the sampler (DDPM: times the largest variance so far). Progress is i/N at spaced step i of N of DDPM.
        interval: ``[t_low, t_high]``, both included, on the scale of the full process (0 … 999); outside it guidance is off
            (Kynkäänniemi et al. 2024). None is everywhere.
        sigma_interval: the same on the scale of σ = √(1/ᾱ − 1), which EDM's samplers go by; where both are given both must hold.
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
    ):
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a number of at least 0, got {gamma}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.gamma, self.every = gamma, every
        self.interval = _check_interval("interval", interval)
        self.sigma_interval = _check_interval("sigma_interval", sigma_interval)

    def sine(self, progress: float) -> float:
        """γ·sin(π·progress), see :class:`~calib_guidance.noise_schedule.NoiseLevels`."""
        return self.gamma * math.sin(math.pi * progress)

    def active(self, levels: NoiseLevels) -> list[bool]:
        """Whether guidance is on at each of the levels."""
        on = levels.executed % self.every == 0
        for values, bounds in ((levels.times, self.interval), (levels.sigmas, self.sigma_interval)):
            if bounds is not None:
                on = on & (bounds[0] <= values) & (values <= bounds[1])
        return on.tolist()
