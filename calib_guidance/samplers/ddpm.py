"""DDPM ancestral sampling with guidance."""

from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.schedules import NoiseLevels, posterior
from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Sampler, Transition
from calib_guidance.samplers.evaluate import Evaluate

Variance = Literal["auto", "learned_range", "fixed_small", "fixed_large"]


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020), guided as in arXiv 2310.11311 Algorithm 1.

    x_{t−1} = μ + (Σ + γ·sin(π·i/N)·Σ_max)·s·∇S + √Σ·z, where Σ_max is the largest variance so far of the sample's first
    element, over every step of the trajectory, guided or not. (The reference implementation takes that of the first sample of the
    batch, for all.)

    Args:
        steps: respacing, e.g. ``"250"``, ``"10,10,5"``, ``"ddim25"``.
        variance: ``learned_range`` interpolates between posterior and β as the network says; ``fixed_small`` is the
            posterior's; ``fixed_large`` is β, at the last step the posterior's second entry; ``auto`` is learned or fixed_large.
        clip_denoised: clip x̂0 to [-1, 1].
        recurrence: times that each step is done, renoising in between (Bansal et al. 2023); 1 is plain sampling.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01])
        >>> noise = SampleStreams(seeds=[0] * 4, indices=range(4), shape=model.image_shape)
        >>> images = DDPM(steps="50")(model, noise, torch.zeros(4, dtype=torch.long))
        >>> [round(abs(float(x))) for x in images]  # each at one of the two means
        [2, 2, 2, 2]
    """

    takes_score = True

    def __init__(
        self,
        steps: str | int = "250",
        variance: Variance = "auto",
        clip_denoised: bool = True,
        recurrence: int = 1,
    ):
        check_choice("variance", variance, get_args(Variance))
        check_numbers(least=1, recurrence=recurrence)
        self.steps, self.variance, self.clip_denoised, self.recurrence = steps, variance, clip_denoised, recurrence

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        super().check(denoiser, guidance)
        if self.variance == "learned_range" and not denoiser.has_learned_variance:
            raise ValueError("variance: the network has no variance channels; use fixed_small or fixed_large")

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        q = posterior(levels.alphas_cumprod)
        small, large = q.log_variance_clipped, np.log(q.betas)
        fixed = small if self.variance == "fixed_small" else np.append(small[0], large[1:])
        return {"from_x0": q.mean_coef1, "from_x": q.mean_coef2, "small": small, "span": large - small, "fixed": fixed}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        guided = evaluate(x, i)
        prediction, score = guided.predicted(), guided.score
        mean = torch.addcmul(c.from_x[i] * x, c.from_x0[i], prediction.x0)
        if prediction.variance is not None and self.variance in ("auto", "learned_range"):
            log_variance = torch.addcmul(c.small[i], prediction.variance, c.span[i])
        else:
            log_variance = c.fixed[i].expand(len(x), 1, 1, 1)
        variance = log_variance.exp()
        first = variance[:, :1, :1, :1]
        largest = c.state["largest_variance"] = torch.maximum(c.state.get("largest_variance", first), first)
        if score is not None:
            mean = torch.addcmul(mean, variance + c.sine[i] * largest, score)
        return Transition(mean, variance.sqrt())
