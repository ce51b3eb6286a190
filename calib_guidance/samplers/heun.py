"""The Heun sampler of EDM with guidance."""

import math
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.samplers.base import Sampler, Transition
from calib_guidance.samplers.evaluate import Evaluate, sample_move
from calib_guidance.samplers.spacing import churned_sigmas, karras_sigmas, levels_of_passes


class Heun(Sampler):
    """Second-order sampling of the probability-flow ODE, or with churn of the SDE (Karras et al. 2022, Algorithms 1 and 2).

    Over N levels σ_j = (σ_max^(1/ρ) + j/(N−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ of X = x0 + σ·ε. ``apply_to: sample``
    (arXiv 2310.11311, Algorithm 2) takes the gradient at X before churn, and moves X̂ by s_j·rms(X)·∇S/rms(∇S) at executed step
    j, s_j = max(s·(N+1−j)/(N+1), 1e-5) + s·γ·sin(π·j/N). All other guidance is part of x̂0, at X̂.

    Args:
        num_steps: N.
        sigma_min, sigma_max: least and greatest noise level.
        rho: ρ, curvature of the steps between them.
        s_churn, s_min, s_max, s_noise: noise that is added over all steps (0 is the ODE), the noise levels between which it is
            added, and its standard deviation.
        guide_correction: guide the second evaluation of a step too, at X'. None does, unless ``apply_to: sample``: Algorithm 2
            moves the sample once per step; true averages two moves (the trapezoidal rule).
        clip_denoised: clip x̂0 to [-1, 1]; EDM does not.
        float32_state: keep the sample in float32, as EDM2 does; EDM's is float64.

    Examples:
        >>> import torch
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(Heun(num_steps=18)(model, noise, torch.tensor([0]))))
        3
    """

    moves_sample, steps_vp = True, False

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
        guide_correction: bool | None = None,
        clip_denoised: bool = False,
        float32_state: bool = False,
    ):
        self.sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho)
        self.raised = churned_sigmas(self.sigmas, s_churn, s_min, s_max, s_noise)
        # Of step i: σ at i, σ̂ at N + i, and the next step's σ at 2N + i, which the last step does not use.
        self.passes = self.sigmas, self.raised, np.append(self.sigmas[0], self.sigmas[:-1])
        self.num_steps, self.s_noise, self.float32_state = num_steps, s_noise, float32_state
        self.guide_correction, self.clip_denoised = guide_correction, clip_denoised

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return levels_of_passes(denoiser.schedule, self.sigmas)

    def evaluated(self, denoiser: Denoiser) -> NoiseLevels:
        return levels_of_passes(denoiser.schedule, *self.passes)

    def nfe(self, denoiser: Denoiser) -> int:
        return (2 * self.num_steps - 1) * denoiser.nfe

    def start(self, noise: Noise, levels: NoiseLevels) -> Tensor:
        return (noise() if self.float32_state else noise().double()) * float(self.sigmas[-1])

    def to_vp(self, x: Tensor, i: int, c: SimpleNamespace) -> Tensor:
        return x if i < 0 else c.to_vp[i] * x

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        sigma, following = np.concatenate(self.passes), np.append(0.0, self.sigmas[:-1])
        tables = {"sigma": sigma, "to_vp": np.sqrt(1 / (1 + sigma**2))}
        return tables | {"h": following - self.raised, "churn": np.sqrt(self.raised**2 - self.sigmas**2) * self.s_noise}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        n, x_hat, move, guided = self.num_steps, x, None, not c.moves_sample
        if self.raised[i] > self.sigmas[i]:
            x_hat = x + c.churn[i] * c.noise()
        if c.moves_sample and (move := sample_move(x, i, i, n, evaluate, c)) is not None:
            x_hat = x_hat + move
        first = self._slope(x_hat, n + i, evaluate, c, guided)
        x_next = x_hat + c.h[i] * first
        if i:
            again = 2 * n + i
            second = self._slope(x_next, again, evaluate, c, guided and self.guide_correction is not False)
            correction = c.h[i] * (second - first)
            if move is not None and self.guide_correction:
                correction = correction + sample_move(x_next, i, again, n, evaluate, c) - move
            x_next = x_next + correction / 2
        return Transition(x_next)

    def _slope(self, x: Tensor, k: int, evaluate: Evaluate, c: SimpleNamespace, guided: bool) -> Tensor:
        """dX/dσ = ε at level ``k``."""
        predict = evaluate if guided else evaluate.unguided
        return (x - predict(c.to_vp[k] * x, k).predicted().x0) / c.sigma[k]
