"""Where noise levels lie."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule

SPACINGS = ("logsnr", "karras", "timesteps")
_SIGMA_MAX = 80.0


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """N levels evenly in σ^(1/ρ), the least noisy first; ``(N,)`` float64 (Karras et al. 2022, Eq. 5).

    Raises:
        ValueError: numbers out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"noise levels must have 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}")
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)[::-1] ** rho


def spaced_levels(
    schedule: NoiseSchedule, spacing: str, steps: str | int, sigma_min: float | None, sigma_max: float | None
) -> NoiseLevels:
    """Levels of a sampler that can stop anywhere, see :class:`~calib_guidance.samplers.multistep.Multistep`."""
    if spacing == "timesteps":
        return schedule.respace(steps).levels
    ends = schedule.levels.sigmas
    low = ends[0] if sigma_min is None else sigma_min
    high = min(ends[-1], _SIGMA_MAX) if sigma_max is None else sigma_max
    sigmas = karras_sigmas(int(steps), low, high)
    if spacing == "logsnr":
        sigmas = np.geomspace(high, low, int(steps))[::-1]
    return schedule.at_sigmas(sigmas)


def churned_sigmas(sigmas: np.ndarray, s_churn: float, s_min: float, s_max: float, s_noise: float) -> np.ndarray:
    """σ̂ ≥ σ to which churn raises each of N levels, ``(N,)`` float64 (Karras et al. 2022, Algorithm 2).

    Raises:
        ValueError: numbers out of range.
    """
    if not (s_churn >= 0 and s_noise >= 0 and s_min <= s_max):
        raise ValueError(
            f"churn needs s_churn ≥ 0, s_noise ≥ 0 and s_min ≤ s_max, got s_churn={s_churn}, s_noise={s_noise}, s_min={s_min}, "
            f"s_max={s_max}"
        )
    churned = (s_min <= sigmas) & (sigmas <= s_max)
    return sigmas * (1 + churned * min(s_churn / len(sigmas), math.sqrt(2) - 1))


def levels_of_passes(schedule: NoiseSchedule, *sigmas: np.ndarray) -> NoiseLevels:
    """Levels of N steps that evaluate at several σ each, ``(N,)`` for each evaluation, one evaluation after the other.

    The first are the levels at which the steps start.
    """
    n = len(sigmas[0])
    start = np.arange(len(sigmas) * n) % n
    executed = n - 1 - start
    return schedule.at_sigmas(np.concatenate(sigmas))._replace(executed=executed, progress=executed / n, start=start)


class StepSizes(NamedTuple):
    """The steps between N noise levels in λ, of which the last leads to x̂0; ``(N,)`` float64.

    Attributes:
        alpha, alpha_next: √ᾱ before and after each step; 1 after the last.
        sigma, sigma_next: σ before and after; 0 after the last.
        h: λ_next − λ; infinite at the last.
        before: h_before over h; 0 at the first and the last step, which have first order.
    """

    alpha: np.ndarray
    alpha_next: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    h: np.ndarray
    before: np.ndarray


def step_sizes(levels: NoiseLevels, order: int) -> StepSizes:
    """Step i from level i to level i − 1, or from level 0 to x̂0."""
    alpha, sigma = np.sqrt(levels.alphas_cumprod), levels.sigmas
    h, before = np.append(math.inf, np.diff(np.log(sigma))), np.zeros(len(sigma))
    if order == 2:
        before[1:-1] = h[1:-1] / h[2:]
    return StepSizes(alpha, np.append(1.0, alpha[:-1]), sigma, np.append(0.0, sigma[:-1]), h, before)
