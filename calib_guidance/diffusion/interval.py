"""Where along a trajectory something is on."""

from collections.abc import Sequence

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers

# Relative: a level's σ and t are recomputed from ᾱ, and bounds are written with few digits.
_TOLERANCE = 1e-6


def _check_interval(name: str, interval: Sequence[float] | None) -> tuple[float, ...] | None:
    if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
        raise ValueError(f"{name} must be [low, high] with low ≤ high, got {list(interval)}")
    return None if interval is None else tuple(interval)


class Interval:
    """Steps at which guidance is on (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    The level at which a step starts, before churn, decides for every evaluation of the step, as in the published code.

    Args:
        interval: ``[t_low, t_high]``, both included, on the scale of the full process (0 … 999); None is everywhere.
        sigma_interval: the same on the scale of σ = √(1/ᾱ − 1); where both are given both must hold.
        every: on at the first step and every so many-th after it.
        step_interval: ``[first, last]``, both included, of the steps done before, 0 the first; None is everywhere.
        flow_interval: ``[low, high]``, both included, of σ/(1 + σ), the time of linear flow models from 0 (image) to 1 (noise).

    Examples:
        >>> from calib_guidance.diffusion import NoiseSchedule
        >>> levels = NoiseSchedule(np.full(4, 0.5)).levels  # index 3, t = 3, is the first step
        >>> Interval([1, 2]).active(levels)
        [False, True, True, False]
    """

    def __init__(
        self,
        interval: Sequence[float] | None = None,
        sigma_interval: Sequence[float] | None = None,
        every: int = 1,
        step_interval: Sequence[int] | None = None,
        flow_interval: Sequence[float] | None = None,
    ):
        check_numbers(least=1, every=every)
        self.every = every
        self.interval = _check_interval("interval", interval)
        self.sigma_interval = _check_interval("sigma_interval", sigma_interval)
        self.step_interval = _check_interval("step_interval", step_interval)
        self.flow_interval = _check_interval("flow_interval", flow_interval)

    def active(self, levels: NoiseLevels) -> list[bool]:
        """Whether guidance is on at each of the levels."""
        on = levels.executed % self.every == 0
        noise = np.sqrt(1 - levels.alphas_cumprod)
        scales = (
            (noise / (np.sqrt(levels.alphas_cumprod) + noise), self.flow_interval),
            (levels.times, self.interval),
            (levels.sigmas, self.sigma_interval),
            (levels.executed, self.step_interval),
        )
        for values, bounds in scales:
            if bounds is not None:
                low, high = bounds[0] - _TOLERANCE * abs(bounds[0]), bounds[1] + _TOLERANCE * abs(bounds[1])
                on = on & ((low <= values) & (values <= high))[levels.start]
        return on.tolist()
