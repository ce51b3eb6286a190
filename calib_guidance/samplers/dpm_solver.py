"""DPM-Solver++ with guidance."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from calib_guidance.samplers.base import Transition
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.multistep import Multistep, on_own_path


class DPMSolver(Multistep):
    """DPM-Solver++ 2M and SDE-DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095).

    With D = x̂0 + (x̂0 − x̂0_before)/(2r), r = h_before/h, a step of h = λ' − λ in λ = log(√ᾱ/√(1−ᾱ)) is

    - ODE: x' = √(1−ᾱ')/√(1−ᾱ)·x + √ᾱ'·(1 − e^(−h))·D
    - SDE: x' = √(1−ᾱ')/√(1−ᾱ)·e^(−h)·x + √ᾱ'·(1 − e^(−2h))·D + √(1−ᾱ')·√(1 − e^(−2h))·z.

    The first step and the last, which ends in x̂0, have D = x̂0. Order 1 has it everywhere, and is DDIM, with η = 1 for the
    SDE. Under CFG++ x̂0_before is that of the noise, x̂0_u, and √ᾱ'·(1 − factor of D)·(x̂0 − x̂0_u) is added.

    Args:
        sde: solve the reverse SDE instead of the ODE: more steps without guidance, fewer with it.
        steps, spacing, sigma_min, sigma_max, order, clip_denoised, guidance_scaling, data_std: see
            :class:`~calib_guidance.samplers.multistep.Multistep`.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(DPMSolver(steps=20, sde=True)(model, noise, torch.tensor([0]))))
        3
    """

    renoises = True

    def __init__(self, steps: str | int = 25, sde: bool = False, **options: Any):
        self.sde = sde
        super().__init__(steps, **options)

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        (x0, renoise), before = evaluate.both(x, i), c.state.get("x0")
        # The slope of x̂0 along the solver's own path.
        d = x0 if before is None else x0 + c.slope[i] * (on_own_path(x0, i, evaluate, c) - before)
        c.state["x0"] = renoise
        mean = c.to_x[i] * x + c.to_d[i] * d
        if renoise is not x0:
            mean = mean + c.to_renoise[i] * (x0 - renoise)
        return Transition(mean, c.std[i] if self.sde else None)
