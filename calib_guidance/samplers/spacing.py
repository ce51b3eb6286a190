"""Where noise levels lie."""

import math

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule
from calib_guidance.errors import check_numbers


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """N levels evenly in σ^(1/ρ), the least noisy first; ``(N,)`` float64 (Karras et al. 2022, Eq. 5)."""
    check_numbers(least=1, num_steps=num_steps)
    check_numbers(above=0, rho=rho)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"noise levels must have 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}")
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)[::-1] ** rho


def churned_sigmas(sigmas: np.ndarray, s_churn: float, s_min: float, s_max: float, s_noise: float) -> np.ndarray:
    """σ̂ ≥ σ to which churn raises each of N levels, ``(N,)`` float64 (Karras et al. 2022, Algorithm 2)."""
    check_numbers(least=0, s_churn=s_churn, s_noise=s_noise)
    if not s_min <= s_max:
        raise ValueError(f"s_min must be at most s_max, got s_min={s_min} and s_max={s_max}")
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
