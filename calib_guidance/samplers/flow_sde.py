"""The SDE of flow models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import PathName, path_coefficients
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice
from calib_guidance.samplers.base import Transition
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.flow import FlowSampler

DiffusionForm = Literal["sigma", "linear", "constant", "decreasing", "sbdm"]
LastStep = Literal["mean", "euler", "tweedie", "none"]


class FlowSDE(FlowSampler):
    """The reverse SDE of a flow model by Euler's and Maruyama's method: x' = x + (−v + w·∇log p)·h + √(2wh)·z.

    Args:
        num_steps: number of steps, the last one included.
        form: w at τ: ``sigma`` σ, ``linear`` τ, ``constant`` 1, ``decreasing`` (1 − cos πτ)²/4, ``sbdm`` σ·σ' − σ²·α'/α, which
            is infinite at pure noise.
        norm: factor of w; in ``decreasing`` that of the cosine.
        last_step: from ``last_step_size`` to the image without noise: ``mean`` of the SDE, ``euler`` of the ODE, ``tweedie`` x̂0;
            ``none`` spreads all steps to τ = 0 and adds noise in the last, as SiT does.
        last_step_size: τ at which the last step starts.

    See :class:`FlowSampler` for the others.
    """

    def __init__(
        self,
        num_steps: int = 250,
        form: DiffusionForm = "sigma",
        norm: float = 1.0,
        last_step: LastStep = "mean",
        last_step_size: float = 0.04,
        path: PathName = "linear",
        start: float = 1.0,
    ):
        check_choice("form", form, get_args(DiffusionForm))
        check_choice("last_step", last_step, get_args(LastStep))
        if form == "sbdm" and path != "vp" and start == 1:
            raise ValueError("form: sbdm is infinite at pure noise of this path: set start below 1, such as 0.95")
        if not norm >= 0 or not 0 < last_step_size < start:
            raise ValueError(
                f"norm must be at least 0 and last_step_size between 0 and start, got {norm} and {last_step_size}"
            )
        super().__init__(num_steps, path, 1.0, start, 0.0)
        self.form, self.norm, self.last_step, self.last_step_size = form, norm, last_step, last_step_size

    def grid(self, denoiser: Denoiser) -> np.ndarray:
        if self.last_step == "none" or self.num_steps == 1:
            return super().grid(denoiser)
        start = min(self.start_time, float(self.highest(denoiser)))
        return np.append(0.0, np.linspace(start, self.last_step_size, self.num_steps)[::-1])

    def diffusion(self, tau: np.ndarray) -> np.ndarray:
        """w at τ."""
        c = path_coefficients(self.path, tau)
        with np.errstate(divide="ignore", invalid="ignore"):
            forms = {
                "sigma": self.norm * c.sigma,
                "linear": self.norm * tau,
                "constant": np.full_like(tau, self.norm),
                "decreasing": (1 - self.norm * np.cos(np.pi * tau)) ** 2 / 4,
                "sbdm": self.norm * (c.sigma * c.d_sigma - c.sigma**2 * c.d_alpha / c.alpha),
            }
        return forms[self.form]

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        tau, c = self.at(levels)
        w, h = self.diffusion(tau), tau - np.append(0.0, tau[:-1])
        std = np.sqrt(2 * w * h)
        to_x0, to_epsilon = -h * c.d_alpha, -h * (c.d_sigma + w / c.sigma)
        if self.last_step == "euler":
            to_epsilon[0] = -h[0] * c.d_sigma[0]
        tables = {"to_x0": to_x0, "to_epsilon": to_epsilon, "std": std, "to_vp": 1 / c.scale}
        return tables | {"alpha": c.alpha, "sigma": c.sigma}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        x0, epsilon = self.predict(x, i, evaluate, c)
        if i == 0 and self.last_step == "tweedie":
            return Transition(x0)
        mean = x + c.to_x0[i] * x0 + c.to_epsilon[i] * epsilon
        if i == 0 and self.last_step == "none":  # the loop adds none in the last step
            return Transition(mean + c.std[i] * c.noise())
        return Transition(mean, c.std[i])
