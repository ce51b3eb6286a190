"""What the multistep solvers of the probability-flow ODE have in common."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Sampler, refuse_sample_shift, refuse_sine
from calib_guidance.samplers.guidance_scaling import GUIDANCE_SCALINGS, choose_guidance_scaling

SPACINGS = ("logsnr", "karras", "timesteps")
_RHO, _SIGMA_MAX = 7.0, 80.0


class StepSizes(NamedTuple):
    """The steps between N noise levels in λ = log(√ᾱ/√(1−ᾱ)) = −ln σ, of which the last leads to x̂0; ``(N,)`` float64.

    Attributes:
        alpha, alpha_next: √ᾱ before and after each step; 1 after the last.
        sigma, sigma_next: VE noise level before and after; 0 after the last.
        h: λ_next − λ; infinite at the last.
        before: step before over this one, 1/r = h/h_before; 0 at the first and the last, which have first order.
    """

    alpha: np.ndarray
    alpha_next: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    h: np.ndarray
    before: np.ndarray


class Multistep(Sampler):
    """Noise levels and guidance of a solver that extrapolates from the x̂0 of the step before: one evaluation a step.

    Classifier guidance enters as ``guidance_scaling`` says (classifier-free guidance is part of x̂0, and of any term):

    - ``ddpm_equivalent``: a gradient at x̂0 is held over the step, and adds to x' what is left in the sample of what
      the short steps
      of DDPM would have added there (:func:`~calib_guidance.samplers.guidance_scaling.ancestral_shift`), so that a scale for 250
      DDPM steps is one for few of these. A gradient with respect to x_t, which is of a score at that noise level, enters as in
      ``score``. Steps that the schedule leaves unguided (``every``, an interval) add nothing, nor do others for them.
    - ``score``: as part of x̂0, which becomes x̂0 + (1−ᾱ)/√ᾱ·s·∇S, the posterior mean under the guided score, and which the
      second order extrapolates. DDIM does this too.
    - ``lie_trotter``, ``strang``: operator splitting (arXiv 2301.11558). The solver does its step without guidance, and the
      guidance term dX/d ln σ = −(1−ᾱ)/√ᾱ·s·∇S (twice that in the SDE) is a step of its own, at a gradient that is taken once:
      before it, or half before and half after it, of which those of two neighbours are done as one. It takes a second
      evaluation of the network at each guided level, since the solver starts from another x than the gradient was taken at.

    What guidance adds to ε (``apply_to: cfg_residual``) is part of x̂0, and is not split.

    Args:
        steps: N; with ``spacing: timesteps`` any respacing of the process, e.g. ``"ddim25"``.
        spacing: where the levels lie. ``logsnr``: evenly in ln σ, on which these solvers count; ``karras``: evenly in σ^(1/7)
            (Karras et al. 2022); ``timesteps``: as the respaced discrete process has them, whose last steps are so long in ln σ
            that the second order extrapolates too far there.
        sigma_min, sigma_max: least and greatest σ of ``logsnr`` and ``karras``; by default those of the model's process, but at
            most 80.
        order: 1 or 2.
        clip_denoised: clip x̂0 to [-1, 1], before guidance; not after it.
        guidance_scaling: see above; by default ``ddpm_equivalent`` of an SDE, ``score`` of an ODE, whose
        ``ddpm_equivalent`` needs
            ``data_std``.
        data_std: d of ``ddpm_equivalent``: standard deviation of the data, in the units of x̂0, along what guidance
        changes. An SDE
            takes 0.5 by default and hardly depends on it. The guidance of an ODE at high noise is proportional to it, so that it
            is to be given, and tuned as a scale is: 1.6 for the digits, which is that of their leading principal components (0.5
            a pixel). Of large images, whose leading components have many times that of a pixel, nothing was measured.

    Raises:
        ValueError: unknown names, numbers out of range, noise levels where the spacing has its own, or no ``data_std`` where it
            decides.
    """

    guidance_scalings = GUIDANCE_SCALINGS
    memory = 1.0  # of a displacement of x the ODE leaves k^1

    def __init__(
        self,
        steps: str | int = 25,
        spacing: str = "logsnr",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        order: int = 2,
        clip_denoised: bool = True,
        guidance_scaling: str | None = None,
        data_std: float | None = None,
    ):
        term, data_std = choose_guidance_scaling(guidance_scaling, data_std, self.memory, self.guidance_scalings)
        if spacing not in SPACINGS:
            raise ValueError(f"spacing: unknown {spacing!r}; known: {', '.join(SPACINGS)}")
        if spacing == "timesteps" and (sigma_min is not None or sigma_max is not None):
            raise ValueError(
                "spacing: timesteps takes its noise levels from the model's process: leave sigma_min and sigma_max out, or set "
                "spacing to karras or logsnr"
            )
        if spacing != "timesteps" and not (str(steps).isdecimal() and int(steps) >= 1):
            raise ValueError(f"steps: spacing: {spacing} needs a number of at least 1, got {steps!r}")
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        self.steps, self.spacing, self.order, self.clip_denoised = steps, spacing, order, clip_denoised
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.guidance_scaling, self.data_std = term, data_std

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        schedule = denoiser.schedule
        if self.spacing == "timesteps":
            return schedule.respace(self.steps).levels
        ends = schedule.levels.sigmas
        low = ends[0] if self.sigma_min is None else self.sigma_min
        high = min(ends[-1], _SIGMA_MAX) if self.sigma_max is None else self.sigma_max
        if not 0 < low < high < math.inf:
            raise ValueError(f"noise levels must have 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
        if self.spacing == "logsnr":
            sigmas = np.geomspace(high, low, int(self.steps))
        else:
            sigmas = np.linspace(high ** (1 / _RHO), low ** (1 / _RHO), int(self.steps)) ** _RHO
        return schedule.at_sigmas(sigmas[::-1])

    def num_evaluations(self, denoiser: Denoiser) -> int:
        """Network evaluations per sample; under splitting of a sampler that is guided at every level."""
        twice = 2 if self.guidance_scaling in ("lie_trotter", "strang") else 1
        return len(self.levels(denoiser).times) * twice * denoiser.evaluations

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        self.levels(denoiser)
        refuse_sample_shift(type(self).__name__, guidance)
        refuse_sine(type(self).__name__, guidance)
        for part in guidance.parts() if guidance else ():
            if self.guidance_scaling in ("lie_trotter", "strang") and part.apply_to == "cfg_residual":
                raise ValueError(
                    f"guidance_scaling: {self.guidance_scaling} does guidance as a step of its own, and apply_to: "
                    f"cfg_residual is "
                    "part of the predicted noise: set guidance_scaling to ancestral or score, or apply_to to score"
                )

    def step_sizes(self, levels: NoiseLevels) -> StepSizes:
        """Step i from level i to level i − 1, or from level 0 to x̂0."""
        alpha, sigma = np.sqrt(levels.alphas_cumprod), levels.sigmas
        alpha_next, sigma_next = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
        h, before = np.append(math.inf, np.diff(np.log(sigma))), np.zeros(len(sigma))
        if self.order == 2:
            before[1:-1] = h[1:-1] / h[2:]
        return StepSizes(alpha, alpha_next, sigma, sigma_next, h, before)
