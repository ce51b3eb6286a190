"""How strong guidance is at each step, and where it is off."""

from __future__ import annotations

import math
from collections.abc import Sequence


class GuidanceSchedule:
    """Sine amplification and interval.

    Args:
        gamma: γ ≥ 0, the sine factor (0.3 in arXiv 2310.11311, Table 6): adds γ·sin(π·i/N) to the strength at spaced step i of
            N, in the units of the sampler (DDPM: times the largest variance so far).
        interval: ``[t_low, t_high]``, both included, on the scale of the full process (0 … 999); outside it guidance is off and
            the classifier is not run (Kynkäänniemi et al. 2024). None is everywhere.

    Raises:
        ValueError: γ < 0, or an interval that is not two ascending numbers.
    """

    def __init__(self, gamma: float = 0.0, interval: Sequence[float] | None = None):
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a number of at least 0, got {gamma}")
        if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
            raise ValueError(f"interval must be [t_low, t_high] with t_low ≤ t_high, got {list(interval)}")
        self.gamma, self.interval = gamma, None if interval is None else tuple(interval)

    def sine(self, i: int, num_steps: int) -> float:
        """γ·sin(π·i/N) at spaced step i, which counts down from N − 1 to 0."""
        return self.gamma * math.sin(math.pi * i / num_steps)

    def is_active(self, t: int) -> bool:
        """Whether guidance is on at step ``t`` of the full process."""
        return self.interval is None or self.interval[0] <= t <= self.interval[1]
