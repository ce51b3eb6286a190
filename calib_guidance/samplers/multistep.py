"""What the multistep solvers of the probability-flow ODE share."""

import math
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice
from calib_guidance.samplers.base import Sampler
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.guidance_scaling import choose_guidance_scaling
from calib_guidance.samplers.spacing import karras_sigmas

Spacing = Literal["logsnr", "karras", "timesteps"]
_SIGMA_MAX = 80.0


class Multistep(Sampler):
    """A solver in λ = log(√ᾱ/√(1−ᾱ)) = −ln σ that extrapolates from the x̂0 of the step before: one evaluation per step.

    Args:
        steps: N; with ``spacing: timesteps`` any respacing of the process, e.g. ``"ddim25"``.
        spacing: ``logsnr``: evenly in ln σ, on which these solvers count; ``karras``: evenly in σ^(1/7) (Karras et al. 2022);
            ``timesteps``: as the respaced process, whose last steps are too long in ln σ for the second order.
        sigma_min, sigma_max: least and greatest σ of ``logsnr`` and ``karras``; by default those of the model's process, but at
            most 80.
        order: 1 or 2.
        clip_denoised: clip x̂0 to [-1, 1], before guidance; not after it.
        guidance_scaling: ``score``: the score shifts x̂0 by (1−ᾱ)/√ᾱ·s·∇S, which the second order extrapolates, as DDIM does.
            ``ddpm_equivalent`` (:class:`~calib_guidance.samplers.guidance_scaling.GuidanceScaling`): a score at x̂0 adds to x'
            what short DDPM steps would have left there; a score with respect to x_t enters as in ``score``. By default
            ``ddpm_equivalent`` of an SDE, ``score`` of an ODE.
        data_std: d of ``ddpm_equivalent``: standard deviation of x̂0 along what guidance changes. An SDE takes 0.5 by default; an
            ODE needs it, tuned as a scale is: 1.6 for the digits, that of their leading principal components.
    """

    sde: bool = False

    def __init__(
        self,
        steps: str | int = 25,
        spacing: Spacing = "logsnr",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        order: Literal[1, 2] = 2,
        clip_denoised: bool = True,
        guidance_scaling: Literal["score", "ddpm_equivalent"] | None = None,
        data_std: float | None = None,
    ):
        # Of a displacement of x the ODE leaves k, the SDE k².
        self.scaling = choose_guidance_scaling(guidance_scaling, data_std, 2.0 if self.sde else 1.0)
        check_choice("spacing", spacing, get_args(Spacing))
        if spacing == "timesteps" and (sigma_min is not None or sigma_max is not None):
            raise ValueError(
                "spacing: timesteps has the model's levels: remove sigma_min and sigma_max, or set karras or logsnr"
            )
        if spacing != "timesteps" and not (str(steps).isdecimal() and int(steps) >= 1):
            raise ValueError(f"steps: spacing: {spacing} needs a number of at least 1, got {steps!r}")
        check_choice("order", order, (1, 2))
        self.steps, self.spacing, self.order, self.clip_denoised = steps, spacing, order, clip_denoised
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        if self.spacing == "timesteps":
            return super().levels(denoiser)
        ends = denoiser.schedule.levels.sigmas
        low = ends[0] if self.sigma_min is None else self.sigma_min
        high = min(ends[-1], _SIGMA_MAX) if self.sigma_max is None else self.sigma_max
        sigmas = karras_sigmas(int(self.steps), low, high)
        if self.spacing == "logsnr":
            sigmas = np.geomspace(high, low, int(self.steps))[::-1]
        return denoiser.schedule.at_sigmas(sigmas)

    def lengths(self, levels: NoiseLevels) -> tuple[np.ndarray, np.ndarray]:
        """h = λ' − λ of each step, and h_before over h: 0 at the first and the infinite last step, which have order 1."""
        h = np.append(math.inf, np.diff(np.log(levels.sigmas)))
        before = np.zeros(len(h))
        if self.order == 2:
            before[1:-1] = h[1:-1] / h[2:]
        return h, before

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        alpha, sigma = np.sqrt(levels.alphas_cumprod), levels.sigmas
        alpha_next, sigma_next = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
        remaining = sigma_next / sigma  # e^(−h)
        to_x = alpha_next / alpha * remaining
        if self.sde:
            to_x, remaining = to_x * remaining, remaining**2
        return {
            "to_x": to_x,
            "to_d": alpha_next * (1 - remaining),
            "to_renoise": alpha_next * remaining,
            "std": alpha_next * sigma_next * np.sqrt(1 - remaining),
            "slope": self.lengths(levels)[1] / 2,
            "response": np.zeros(len(sigma)) if self.scaling is None else self.scaling.response(levels),
        }


def on_own_path(x0: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Tensor:
    """x̂0 where the solver's own step ended, from which x differs by what guidance added since."""
    return x0 if evaluate.moved is None else x0 - c.response[i] * evaluate.moved
