"""How strong classifier guidance is at each step, and where it is off."""

import math
from typing import Any, final

from calib_guidance.diffusion.interval import Interval
from calib_guidance.errors import check_numbers


@final
class GuidanceSchedule(Interval):
    """Schedule of classifier guidance: sine amplification, and where guidance is off and no classifier runs.

    Args:
        gamma: γ ≥ 0, the sine factor (0.3 in arXiv 2310.11311, Table 6): adds γ·sin(π·progress) to the strength, in the units
            of the sampler (DDPM: times the largest variance so far, guided or not). Progress is i/N at step i of N of DDPM.
        interval, sigma_interval, step_interval, flow_interval: see :class:`~calib_guidance.diffusion.interval.Interval`.
        every: guide the first step and every so many-th after it. Between them nothing stands in for the gradient, so that
            the total strength falls with it.

    Examples:
        >>> GuidanceSchedule(gamma=0.3).sine(0.5)
        0.3
    """

    def __init__(self, gamma: float = 0.0, *args: Any, **kwargs: Any):
        check_numbers(least=0, gamma=gamma)
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    def sine(self, progress: float) -> float:
        """γ·sin(π·progress), see :class:`~calib_guidance.diffusion.schedules.NoiseLevels`."""
        return self.gamma * math.sin(math.pi * progress)
