"""Guidance scaled to the size of a step, so that one scale fits any number of steps."""

import math
from typing import NamedTuple

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers

_DATA_STD = 0.5  # per pixel of an image, as EDM takes it


class GuidanceScaling(NamedTuple):
    """A step adds to x' what short DDPM steps leave in the sample (``guidance_scaling: ddpm_equivalent``).

    In X = x/√ᾱ a DDPM step from σ to σ − dσ adds 2·(1−ᾱ)/√ᾱ·s·∇S·dσ/σ, whatever the number of steps. The effect at the end is
    linear response, in closed form for Gaussian data of standard deviation d, where x̂0 moves by k² = d²/(d² + σ²) of X: of a
    displacement at σ, DDPM leaves k², the probability-flow ODE k. So a step from σ to σ' leaves, at a constant gradient,

        I = ∫_σ'^σ 2·(1−ᾱ)/√ᾱ·k² dσ/σ = ∫_σ'^σ 2d²·σ / ((d² + σ²)·√(1 + σ²)) dσ,

    and adds I over what the sampler leaves of a displacement at σ', which is k'^p. Many short steps of the SDE add the same
    without this. The derivation is this project's own: docs/few_steps.md.

    Attributes:
        data_std: d.
        exponent: p, 1 for the ODE, 2 for the reverse SDE, 1 + η² for DDIM.
    """

    data_std: float
    exponent: float

    def added(self, levels: NoiseLevels) -> np.ndarray:
        """What each step adds to x' per unit of s·∇S, ``(N,)`` float64."""
        alpha, sigma = np.sqrt(levels.alphas_cumprod), levels.sigmas
        shift = ddpm_equivalent_shift(sigma, np.append(0.0, sigma[:-1]), *self)
        return np.append(1.0, alpha[:-1]) * shift

    def response(self, levels: NoiseLevels) -> np.ndarray:
        """How far x̂0 moves with x, k²/√ᾱ, ``(N,)`` float64."""
        return self.data_std**2 / (self.data_std**2 + levels.sigmas**2) / np.sqrt(levels.alphas_cumprod)


def ddpm_equivalent_shift(sigma: np.ndarray, sigma_next: np.ndarray, data_std: float, exponent: float) -> np.ndarray:
    """What steps from ``sigma`` to ``sigma_next`` add to x/√ᾱ per unit of s·∇S; ``(N,)`` float64 each."""
    q = math.sqrt(abs(1 - data_std**2))

    def antiderivative(sigma: np.ndarray) -> np.ndarray:
        root = np.sqrt(1 + sigma**2)
        if data_std == 1:
            return -1 / root
        if data_std > 1:
            return np.arctan(root / q) / q
        # root − q, without cancellation.
        return np.log((sigma**2 + data_std**2) / (root + q) ** 2) / (2 * q)

    left = 2 * data_std**2 * (antiderivative(sigma) - antiderivative(sigma_next))
    return left * (1 + (sigma_next / data_std) ** 2) ** (exponent / 2)


def choose_guidance_scaling(scaling: str | None, data_std: float | None, exponent: float) -> GuidanceScaling | None:
    """What an option ``guidance_scaling`` means for a sampler.

    For the reverse SDE (p = 2) d matters only as far as k² changes within one step. What an ODE keeps of what is added at σ ≫ d
    is proportional to d, and no d is right for all data, so it has ``score`` by default.
    """
    scaling = scaling or ("ddpm_equivalent" if exponent >= 2 else "score")
    check_choice("guidance_scaling", scaling, ("score", "ddpm_equivalent"))
    check_numbers(above=0, null="the default", data_std=data_std)
    if scaling == "score":
        return None
    if data_std is None and exponent < 2:
        raise ValueError(
            "guidance_scaling: ddpm_equivalent of an ODE is proportional to the standard deviation of the data along what "
            "guidance changes: set data_std (1.6 for the digits), guidance_scaling to score, or take an SDE"
        )
    return GuidanceScaling(data_std or _DATA_STD, exponent)
