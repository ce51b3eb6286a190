"""What the multistep solvers of the probability-flow ODE share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.samplers.base import Sampler
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.guidance_scaling import choose_guidance_scaling
from calib_guidance.samplers.spacing import SPACINGS, spaced_levels


class Multistep(Sampler):
    """A solver in λ = log(√ᾱ/√(1−ᾱ)) = −ln σ that extrapolates from the x̂0 of the step before: one evaluation per step.

    Args:
        steps: N; with ``spacing: timesteps`` any respacing of the process, e.g. ``"ddim25"``.
        spacing: ``logsnr``: evenly in ln σ, on which these solvers count; ``karras``: evenly in σ^(1/7) (Karras et al. 2022);
            ``timesteps``: as the respaced discrete process, whose last steps are so long in ln σ that the second order
            extrapolates too far there.
        sigma_min, sigma_max: least and greatest σ of ``logsnr`` and ``karras``; by default those of the model's process, but at
            most 80.
        order: 1 or 2.
        clip_denoised: clip x̂0 to [-1, 1], before guidance; not after it.
        guidance_scaling: ``score``: the score shifts x̂0 by (1−ᾱ)/√ᾱ·s·∇S, which the second order extrapolates, as DDIM does.
            ``ddpm_equivalent`` (:class:`~calib_guidance.samplers.guidance_scaling.GuidanceScaling`): a score at x̂0 adds to x'
            what short DDPM steps would have left there, so that a scale for 250 DDPM steps is one for few of these; a score
            with respect to x_t enters as in ``score``. By default ``ddpm_equivalent`` of an SDE, ``score`` of an ODE.
        data_std: d of ``ddpm_equivalent``: standard deviation of the data, in the units of x̂0, along what guidance changes. An
            SDE takes 0.5 by default and hardly depends on it; an ODE needs it, tuned as a scale is: 1.6 for the digits, that of
            their leading principal components (0.5 a pixel). For large images nothing was measured.

    Raises:
        ValueError: numbers out of range, noise levels where the spacing has its own, or no ``data_std`` where it matters.
    """

    exponent = 1.0  # of a displacement of x the ODE leaves k

    def __init__(
        self,
        steps: str | int = 25,
        spacing: Literal["logsnr", "karras", "timesteps"] = "logsnr",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        order: Literal[1, 2] = 2,
        clip_denoised: bool = True,
        guidance_scaling: Literal["score", "ddpm_equivalent"] | None = None,
        data_std: float | None = None,
    ):
        self.scaling = choose_guidance_scaling(guidance_scaling, data_std, self.exponent)
        if spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
        if spacing == "timesteps" and (sigma_min is not None or sigma_max is not None):
            raise ValueError(
                "spacing: timesteps takes its noise levels from the model's process: remove sigma_min and sigma_max, or set "
                "spacing to karras or logsnr"
            )
        if spacing != "timesteps" and not (str(steps).isdecimal() and int(steps) >= 1):
            raise ValueError(f"steps: spacing: {spacing} needs a number of at least 1, got {steps!r}")
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        self.steps, self.spacing, self.order, self.clip_denoised = steps, spacing, order, clip_denoised
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return spaced_levels(denoiser.schedule, self.spacing, self.steps, self.sigma_min, self.sigma_max)

    def response(self, levels: NoiseLevels) -> np.ndarray:
        """How far x̂0 moves with what guidance adds to x, ``(N,)``."""
        return np.zeros(len(levels.times)) if self.scaling is None else self.scaling.response(levels)


def on_own_path(x0: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Tensor:
    """x̂0 where the solver's own step ended, from which x differs by what guidance added since."""
    return x0 if evaluate.moved is None else x0 - c.response[i] * evaluate.moved
