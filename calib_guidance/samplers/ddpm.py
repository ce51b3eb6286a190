"""DDPM ancestral sampling with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Observer, Sampler, StepRecord, on_device, refuse_sample_shift, start

VARIANCES = ("auto", "learned_range", "fixed_small", "fixed_large")


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020), guided as in arXiv 2310.11311 Algorithm 1.

    x_{t−1} = μ + (Σ + γ·sin(π·i/N)·Σ_max)·s·∇S + √Σ·z, where Σ_max is the largest variance so far of the sample's first
    element. (The reference implementation takes that of the first sample of the batch, for all.)

    Args:
        steps: respacing, e.g. ``"250"``, ``"10,10,5"``, ``"ddim25"``.
        variance: ``learned_range`` interpolates between posterior and β as the network says; ``fixed_small`` is the
            posterior's; ``fixed_large`` is β, at the last step the posterior's second entry; ``auto`` is learned where the
            network learned one, otherwise fixed_large, as guided-diffusion does.
        clip_denoised: clip x̂0 to [-1, 1].
        recurrence: times that each step is done, re-noising in between (Bansal et al. 2023); 1 is plain sampling.

    Raises:
        ValueError: unknown names or numbers out of range.
    """

    def __init__(
        self, steps: str | int = "250", variance: str = "auto", clip_denoised: bool = True, recurrence: int = 1
    ):
        if variance not in VARIANCES:
            raise ValueError(f"variance: unknown {variance!r}; known: {', '.join(VARIANCES)}")
        if recurrence < 1:
            raise ValueError(f"recurrence must be at least 1, got {recurrence}")
        self.steps, self.variance, self.clip_denoised, self.recurrence = steps, variance, clip_denoised, recurrence

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return denoiser.schedule.respace(self.steps).levels

    def num_evaluations(self, denoiser: Denoiser) -> int:
        return len(denoiser.schedule.respace(self.steps)) * self.recurrence * denoiser.evaluations

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        denoiser.schedule.respace(self.steps)
        refuse_sample_shift(type(self).__name__, guidance)
        if self.variance == "learned_range" and not denoiser.has_learned_variance:
            raise ValueError(
                "variance: learned_range, but the network has no variance channels; use fixed_small or fixed_large"
            )

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
        from_x0, from_x = on_device(schedule.posterior_mean_coef1, x), on_device(schedule.posterior_mean_coef2, x)
        small, large = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
        learned = denoiser.has_learned_variance and self.variance in ("auto", "learned_range")
        fixed = small if self.variance == "fixed_small" else np.append(small[0], large[1:])
        low, span = on_device(small if learned else fixed, x), on_device(large - small, x)
        keep, renoise = on_device(np.sqrt(1 - schedule.betas), x), on_device(np.sqrt(schedule.betas), x)
        # ε enters the mean through x̂0, by this slope.
        from_noise = on_device(np.sqrt(1 / schedule.alphas_cumprod - 1), x)
        largest_variance = x.new_zeros(len(x), 1, 1, 1)

        for i in reversed(range(num_steps)):
            for repeat in range(self.recurrence):
                guided = guide(predict, x, i)
                x0, fraction, _ = guided.prediction
                if guided.noise_shift is not None:
                    x0 = x0 + from_noise[i] * guided.noise_shift
                x_next = torch.addcmul(from_x[i] * x, from_x0[i], x0)
                log_variance = torch.addcmul(low[i], fraction, span[i]) if learned else low[i].expand(len(x), 1, 1, 1)
                variance = log_variance.exp()
                if guided.gradient is not None:
                    largest_variance = torch.maximum(largest_variance, variance[:, :1, :1, :1])
                    x_next = torch.addcmul(x_next, variance + guided.sine * largest_variance, guided.gradient)
                if i:
                    x_next = torch.addcmul(x_next, variance.sqrt(), noise())
                for observe in observers:
                    observe(StepRecord(i, num_steps, timesteps[i], y, x, guided, x_next))
                x = x_next
                if repeat < self.recurrence - 1:
                    x = keep[i] * x + renoise[i] * noise()
        return x
