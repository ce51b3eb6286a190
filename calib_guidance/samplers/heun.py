"""The Heun sampler of EDM with guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule
from calib_guidance.guidance.base import Guidance, GuidedPrediction
from calib_guidance.guidance.classifier_guidance import rms
from calib_guidance.samplers.base import Observer, Sampler, StepRecord, start

_LEAST_STRENGTH = 1e-5


class Heun(Sampler):
    """Second-order sampling of the probability-flow ODE, or with churn of the SDE (Karras et al. 2022, Algorithms 1 and 2),
    in float64 over noise levels σ.

    Guidance enters by what it asks for:

    - ``apply_to: sample`` (arXiv 2310.11311, Algorithm 2): the gradient is taken at x before churn, and moves x̂ by
      s_j·rms(x)·∇S/rms(∇S) at executed step j of N, s_j = max(s·(N+1−j)/(N+1), 1e-5) + s·γ·sin(π·j/N).
    - ``apply_to: score`` as in DDIM: ε ← ε − √(1−ᾱ)·s·∇S, at x̂.
    - ``apply_to: cfg_residual``: ε is shifted as classifier-free guidance would shift it, at x̂.

    Args:
        num_steps: N.
        sigma_min, sigma_max: least and greatest noise level.
        rho: ρ, curvature of the steps between them: σ_j = (σ_max^(1/ρ) + j/(N−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ.
        s_churn: noise that is added, over all steps; 0 is the ODE.
        s_min, s_max: noise levels between which it is added.
        s_noise: standard deviation of what is added.
        guide_correction: guide the second half of the step too, where the gradient is taken again, at x_next. (``sample``: the
            two shifts are averaged, the trapezoidal rule.) Published numbers are without.
        clip_denoised: clip x̂0 to [-1, 1]; EDM does not.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        num_steps: int = 18,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
        guide_correction: bool = False,
        clip_denoised: bool = False,
    ):
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"noise levels must have 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if not rho > 0:
            raise ValueError(f"rho must be above 0, got {rho}")
        if not (s_churn >= 0 and s_noise >= 0 and s_min <= s_max):
            raise ValueError(
                f"churn needs s_churn ≥ 0, s_noise ≥ 0 and s_min ≤ s_max, got s_churn={s_churn}, s_noise={s_noise}, "
                f"s_min={s_min}, s_max={s_max}"
            )
        self.num_steps, self.sigma_min, self.sigma_max, self.rho = num_steps, sigma_min, sigma_max, rho
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.guide_correction, self.clip_denoised = guide_correction, clip_denoised

    def sigmas(self) -> tuple[np.ndarray, np.ndarray]:
        """σ of the N steps, the least noisy first, and σ̂ ≥ σ to which churn raises each; ``(N,)`` float64."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = np.linspace(*ends, self.num_steps)[::-1] ** self.rho
        churned = (self.s_min <= sigma) & (sigma <= self.s_max)
        return sigma, sigma * (1 + churned * min(self.s_churn / self.num_steps, math.sqrt(2) - 1))

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return self._at(denoiser.schedule, self.sigmas()[0])

    def _at(self, schedule: NoiseSchedule, sigmas: np.ndarray) -> NoiseLevels:
        """Levels of σ of the N steps; of 2N, 3N … numbers, each N of which belong to the N steps."""
        executed = np.arange(len(sigmas))[::-1] % self.num_steps
        return schedule.at_sigmas(sigmas)._replace(executed=executed, progress=executed / self.num_steps)

    def num_evaluations(self, denoiser: Denoiser) -> int:
        return (2 * self.num_steps - 1) * denoiser.evaluations

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        parts = guidance.parts() if guidance else ()
        if len({part.apply_to == "sample" for part in parts}) > 1:
            raise ValueError(
                "one part of the guidance has apply_to: sample and another does not, but a step takes the gradient either before "
                "churn or after it: set apply_to to sample in all of them, or in none"
            )
        for part in parts:
            if part.apply_to == "sample" and part.scale < 0:
                raise ValueError(
                    f"the strength of apply_to: sample is at least 1e-5, so that scale cannot be negative, got {part.scale}: set "
                    "it to 0 to switch guidance off"
                )
            if part.apply_to == "score" and part.schedule.gamma:
                raise ValueError(
                    "the sine factor of apply_to: score is defined through the variance of a DDPM step, and Heun has none: set "
                    "the guidance schedule's gamma to 0, or apply_to to sample"
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
        n, (current, raised) = self.num_steps, self.sigmas()
        # Three levels for each step i: σ at i, σ̂ at n + i, and the next step's σ at 2n + i (which the last step does not use).
        levels = self._at(denoiser.schedule, np.concatenate([current, raised, current[:1], current[:-1]]))
        predict, guide = start(denoiser, guidance, levels, y, self.clip_denoised)
        to_vp, times = np.sqrt(levels.alphas_cumprod).tolist(), levels.times.tolist()
        current, raised, following = current.tolist(), raised.tolist(), [0.0, *current[:-1].tolist()]
        moves = guidance is not None and any(part.apply_to == "sample" for part in guidance.parts())

        def shift(guided: GuidedPrediction, x: Tensor, i: int) -> Tensor | float:
            """What guidance that enters the sample adds to it at step ``i``."""
            if guided.direction is None:
                return 0.0
            strength = max(guided.scale * (i + 2) / (n + 1), _LEAST_STRENGTH) + guided.scale * guided.sine
            return strength * rms(x) * guided.direction

        def slope(guided: GuidedPrediction, x: Tensor, sigma: float) -> Tensor:
            """dx/dσ = ε of the guided prediction."""
            epsilon = (x - guided.prediction.x0) / sigma
            if guided.gradient is not None:
                epsilon = epsilon - sigma / math.sqrt(1 + sigma**2) * guided.gradient
            if guided.noise_shift is not None:
                epsilon = epsilon - guided.noise_shift
            return epsilon

        x = noise().double() * current[-1]
        for i in reversed(range(n)):
            sigma, sigma_hat, sigma_next, x_hat = current[i], raised[i], following[i], x
            if sigma_hat > sigma:
                x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * self.s_noise * noise()
            if moves:
                guided = guide(predict, to_vp[i] * x, i, gradient_only=True)
                moved = shift(guided, x, i)
                x_hat = x_hat + moved
                guided = guided._replace(prediction=predict(to_vp[n + i] * x_hat, n + i))
            else:
                guided = guide(predict, to_vp[n + i] * x_hat, n + i)
            first = slope(guided, x_hat, sigma_hat)
            x_next = x_hat + (sigma_next - sigma_hat) * first
            if i:
                after, x_t = 2 * n + i, to_vp[2 * n + i] * x_next
                second = guide(predict, x_t, after) if self.guide_correction else GuidedPrediction(predict(x_t, after))
                correction = (sigma_next - sigma_hat) * (slope(second, x_next, sigma_next) - first)
                if guided.direction is not None and second.direction is not None:
                    correction = correction + shift(second, x_next, i) - moved
                x_next = x_next + correction / 2
            for observe in observers:
                observe(StepRecord(i, n, times[i], y, to_vp[i] * x, guided, (to_vp[i - 1] if i else 1.0) * x_next))
            x = x_next
        return x.float()
