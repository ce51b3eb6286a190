"""DDIM sampling with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import (
    Observer,
    Sampler,
    StepRecord,
    on_device,
    refuse_sample_shift,
    refuse_sine,
    start,
)
from calib_guidance.samplers.guidance_scaling import GuidanceScaling, choose_guidance_scaling


class DDIM(Sampler):
    """DDIM (Song et al. 2021), guided through the score: ε ← ε − √(1−ᾱ)·s·∇S (Dhariwal & Nichol 2021, Algorithm 2), or as
    short steps of DDPM would be.

    x̂0 is clipped before guidance and not after it.

    Args:
        steps: respacing, e.g. ``"ddim25"``, ``"50"``.
        eta: η ≥ 0 of the added noise; 0 is deterministic, 1 has the variance of ancestral sampling.
        clip_denoised: clip x̂0 to [-1, 1].
        recurrence: times that each step is done, re-noising in between (Bansal et al. 2023); 1 is plain sampling.
        guidance_scaling: ``score``, or ``ddpm_equivalent``, which carries a scale over from DDPM, see
            :class:`~calib_guidance.samplers.multistep.Multistep`.
        data_std: of ``ddpm_equivalent``, see there; to be given where η < 1.

    Raises:
        ValueError: an unknown term, numbers out of range, or no ``data_std`` where it decides.
    """

    def __init__(
        self,
        steps: str | int = "ddim25",
        eta: float = 0.0,
        clip_denoised: bool = True,
        recurrence: int = 1,
        guidance_scaling: str = "score",
        data_std: float | None = None,
    ):
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        if recurrence < 1:
            raise ValueError(f"recurrence must be at least 1, got {recurrence}")
        term, data_std = choose_guidance_scaling(guidance_scaling, data_std, 1 + eta**2, ("score", "ddpm_equivalent"))
        self.steps, self.eta, self.clip_denoised, self.recurrence = steps, eta, clip_denoised, recurrence
        self.guidance_scaling, self.data_std = term, data_std

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return denoiser.schedule.respace(self.steps).levels

    def num_evaluations(self, denoiser: Denoiser) -> int:
        return len(denoiser.schedule.respace(self.steps)) * self.recurrence * denoiser.evaluations

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        denoiser.schedule.respace(self.steps)
        refuse_sample_shift(type(self).__name__, guidance)
        refuse_sine(type(self).__name__, guidance)

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
        schedule = denoiser.schedule.respace(self.steps)
        num_steps, timesteps = len(schedule), schedule.timesteps.tolist()
        predict, guide = start(denoiser, guidance, schedule.levels, y, self.clip_denoised)
        abar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        sigmas = self.eta * np.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        from_x, from_noise = on_device(np.sqrt(1 / abar), x), on_device(np.sqrt(1 / abar - 1), x)
        to_score = on_device(np.sqrt(1 - abar), x)
        to_x0, sigma = on_device(np.sqrt(previous), x), on_device(sigmas, x)
        to_epsilon = on_device(np.sqrt(np.maximum(1 - previous - sigmas**2, 0)), x)
        term = GuidanceScaling(self.guidance_scaling, schedule.levels, self.data_std, 1 + self.eta**2, x)
        keep, renoise = on_device(np.sqrt(1 - schedule.betas), x), on_device(np.sqrt(schedule.betas), x)

        for i in reversed(range(num_steps)):
            for repeat in range(self.recurrence):
                guided = guide(predict, x, i)
                x0 = guided.prediction.x0
                epsilon = (from_x[i] * x - x0) / from_noise[i]
                shift = guided.noise_shift
                if guided.gradient is not None and not term.of_step(guided):
                    shift = to_score[i] * guided.gradient
                if shift is not None:
                    epsilon = epsilon - shift
                    x0 = from_x[i] * x - from_noise[i] * epsilon
                x_next = to_x0[i] * x0 + to_epsilon[i] * epsilon + term.end(guided, i)
                if self.eta and i:
                    x_next = x_next + sigma[i] * noise()
                for observe in observers:
                    observe(StepRecord(i, num_steps, timesteps[i], y, x, guided, x_next))
                x = x_next
                if repeat < self.recurrence - 1:
                    x = keep[i] * x + renoise[i] * noise()
        return x
