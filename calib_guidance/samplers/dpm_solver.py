"""DPM-Solver++ with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Observer, StepRecord, on_device, start
from calib_guidance.samplers.guidance_scaling import GuidanceScaling
from calib_guidance.samplers.multistep import Multistep


class DPMSolver(Multistep):
    """DPM-Solver++ 2M and SDE-DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), guided as the guidance term says.

    With D = x̂0 + (x̂0 − x̂0_before)/(2r), r = h_before/h, a step of h = λ' − λ in λ = log(√ᾱ/√(1−ᾱ)) is

    - ODE: x' = √(1−ᾱ')/√(1−ᾱ)·x + √ᾱ'·(1 − e^(−h))·D
    - SDE: x' = √(1−ᾱ')/√(1−ᾱ)·e^(−h)·x + √ᾱ'·(1 − e^(−2h))·D + √(1−ᾱ')·√(1 − e^(−2h))·z.

    The first step and the last, which ends in x̂0, have D = x̂0. Order 1 has it everywhere, and is DDIM, with η = 1 for the
    SDE.

    Args:
        sde: solve the reverse SDE instead of the ODE: more steps without guidance, fewer with it.
        steps, spacing, sigma_min, sigma_max, order, clip_denoised, guidance_scaling, data_std: see
            :class:`~calib_guidance.samplers.multistep.Multistep`.
    """

    def __init__(
        self,
        steps: str | int = 25,
        sde: bool = False,
        spacing: str = "logsnr",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        order: int = 2,
        clip_denoised: bool = True,
        guidance_scaling: str | None = None,
        data_std: float | None = None,
    ):
        self.sde, self.memory = sde, 2.0 if sde else 1.0
        super().__init__(steps, spacing, sigma_min, sigma_max, order, clip_denoised, guidance_scaling, data_std)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Noise,
        y: Tensor,
        guidance: Guidance | None = None,
        observers: Sequence[Observer] = (),
    ) -> Tensor:
        x = noise()
        levels = self.levels(denoiser)
        num_steps, times = len(levels.times), levels.times.tolist()
        predict, guide = start(denoiser, guidance, levels, y, self.clip_denoised)
        sizes = self.step_sizes(levels)
        term = GuidanceScaling(self.guidance_scaling, levels, self.data_std, self.memory, x)
        remaining = sizes.sigma_next / sizes.sigma  # e^(−h)
        keep = sizes.alpha_next / sizes.alpha * remaining
        if self.sde:
            keep, remaining = keep * remaining, remaining**2
        to_x, to_d = on_device(keep, x), on_device(sizes.alpha_next * (1 - remaining), x)
        to_noise = on_device(sizes.alpha_next * sizes.sigma_next * np.sqrt(1 - remaining), x)
        slope = on_device(sizes.before / 2, x)

        before = None
        for i in reversed(range(num_steps)):
            guided, begun, x0, arrived = term.begin(predict, guide, x, i)
            # The slope of x̂0 along the solver's own path, which a step of guidance interrupts.
            d = x0 if before is None else x0 + slope[i] * (arrived - before)
            x_next = to_x[i] * begun + to_d[i] * d + term.end(guided, i)
            if self.sde and i:
                x_next = x_next + to_noise[i] * noise()
            for observe in observers:
                observe(StepRecord(i, num_steps, times[i], y, x, guided, x_next))
            x, before = x_next, x0
        return x
