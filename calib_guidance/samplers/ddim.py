"""DDIM sampling with guidance."""

from types import SimpleNamespace
from typing import Literal

import numpy as np
from torch import Tensor

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers
from calib_guidance.samplers.base import Sampler, Transition
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.guidance_scaling import choose_guidance_scaling


class DDIM(Sampler):
    """Denoising diffusion implicit sampler (Song et al. 2021), guided through the score: ε ← ε − √(1−ᾱ)·s·∇S
    (Dhariwal & Nichol 2021, Algorithm 2).

    x' = √ᾱ'·x̂0 + √(1−ᾱ'−σ²)·ε + σ·z with σ = η·√((1−ᾱ')/(1−ᾱ))·√(1−ᾱ/ᾱ'). x̂0 is clipped before guidance and not after it.

    Args:
        steps: respacing, e.g. ``"ddim25"``, ``"50"``.
        eta: η ≥ 0 of the added noise; 0 is deterministic, 1 has the variance of ancestral sampling.
        clip_denoised: clip x̂0 to [-1, 1].
        recurrence: times that each step is done, renoising in between (Bansal et al. 2023); 1 is plain sampling.
        guidance_scaling: ``score``, or ``ddpm_equivalent`` for a scale that was tuned with DDPM, see
            :class:`~calib_guidance.samplers.guidance_scaling.GuidanceScaling`.
        data_std: d of ``ddpm_equivalent``; required where η < 1.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(DDIM(steps="50")(model, noise, torch.tensor([0]))))
        3
    """

    renoises = True

    def __init__(
        self,
        steps: str | int = "ddim25",
        eta: float = 0.0,
        clip_denoised: bool = True,
        recurrence: int = 1,
        guidance_scaling: Literal["score", "ddpm_equivalent"] = "score",
        data_std: float | None = None,
    ):
        check_numbers(least=0, eta=eta)
        check_numbers(least=1, recurrence=recurrence)
        self.scaling = choose_guidance_scaling(guidance_scaling, data_std, 1 + eta**2)
        self.steps, self.eta, self.clip_denoised, self.recurrence = steps, eta, clip_denoised, recurrence

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        abar, previous = levels.alphas_cumprod, np.append(1.0, levels.alphas_cumprod[:-1])
        sigma = self.eta * np.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        return {
            "from_x": np.sqrt(1 / abar),
            "from_noise": np.sqrt(1 / abar - 1),
            "to_x0": np.sqrt(previous),
            "to_epsilon": np.sqrt(np.maximum(1 - previous - sigma**2, 0)),
            "sigma": sigma,
        }

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        x0, renoise = evaluate.both(x, i)
        epsilon = (c.from_x[i] * x - renoise) / c.from_noise[i]
        return Transition(c.to_x0[i] * x0 + c.to_epsilon[i] * epsilon, c.sigma[i] if self.eta else None)
