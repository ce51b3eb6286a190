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
from calib_guidance.samplers.diffusion_forms import DiffusionForm, diffusion
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.flow import IMAGE, FlowSampler
from calib_guidance.samplers.spacing import levels_of_passes

LastStep = Literal["mean", "euler", "tweedie", "none"]


class FlowSDE(FlowSampler):
    """The reverse SDE of a flow model: x' = x + (−v + w·∇log p)·h + √(2wh)·z.

    Args:
        num_steps: number of steps, the last one included.
        form, norm: of w, see :func:`~calib_guidance.samplers.diffusion_forms.diffusion`.
        last_step: from ``last_step_size`` to the image without noise: ``mean`` of the SDE, ``euler`` of the ODE, ``tweedie`` x̂0;
            ``none`` spreads all steps to τ = 0 and adds noise in the last, as SiT does.
        last_step_size: τ at which the last step starts.
        method: ``euler`` (Euler and Maruyama); or SiT's ``heun``: noise first, then the mean of the drifts at both ends.

    See :class:`FlowSampler` for the others.

    Examples:
        >>> import torch
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(FlowSDE(num_steps=50)(model, noise, torch.tensor([0]))))
        3
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
        method: Literal["euler", "heun"] = "euler",
    ):
        check_choice("form", form, get_args(DiffusionForm))
        check_choice("method", method, ("euler", "heun"))
        check_choice("last_step", last_step, get_args(LastStep))
        if form == "sbdm" and path != "vp" and start == 1:
            raise ValueError("form: sbdm is infinite at pure noise of this path: set start below 1, such as 0.95")
        if not norm >= 0 or not 0 < last_step_size < start:
            raise ValueError(f"needed: norm ≥ 0 and 0 < last_step_size < start, got {norm} and {last_step_size}")
        super().__init__(num_steps, path, 1.0, start, 0.0)
        self.form: DiffusionForm = form
        self.norm, self.method, self.last_step, self.last_step_size = norm, method, last_step, last_step_size

    def grid(self, denoiser: Denoiser) -> np.ndarray:
        if self.last_step == "none" or self.num_steps == 1:
            return super().grid(denoiser)
        start = min(self.start_time, float(self.highest(denoiser)))
        return np.append(0.0, np.linspace(start, self.last_step_size, self.num_steps)[::-1])

    def evaluated(self, denoiser: Denoiser) -> NoiseLevels:
        grid = np.maximum(self.grid(denoiser), IMAGE)
        passes = [grid[1:], grid[:-1]][: 1 + (self.method == "heun")]
        return levels_of_passes(denoiser.schedule, *map(self.sigmas, passes))

    def nfe(self, denoiser: Denoiser) -> int:
        second = (self.num_steps - (self.last_step != "none")) * (self.method == "heun")
        return (self.num_steps + second) * denoiser.nfe

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        tau, _ = self.at(levels)
        following = np.append(0.0, tau[:-1])
        # Of step i: at its level, and with Heun where it leads, at N + i.
        both, h = np.concatenate([tau, np.maximum(following, IMAGE)]), np.tile(tau - following, 2)
        c, w = path_coefficients(self.path, both), diffusion(self.form, self.norm, self.path, both)
        to_x0, to_epsilon = -h * c.d_alpha, -h * (c.d_sigma + w / c.sigma)
        if self.last_step == "euler":
            to_epsilon[0] = -h[0] * c.d_sigma[0]
        tables = {"to_x0": to_x0, "to_epsilon": to_epsilon, "std": np.sqrt(2 * w * h), "to_vp": 1 / c.scale}
        return tables | {"alpha": c.alpha, "sigma": c.sigma}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        two = self.method == "heun" and (i > 0 or self.last_step == "none")
        x = x + c.std[i] * c.noise() if two else x
        x0, epsilon = self.predict(x, i, evaluate, c)
        if i == 0 and self.last_step == "tweedie":
            return Transition(x0)
        move = c.to_x0[i] * x0 + c.to_epsilon[i] * epsilon
        if two:
            k = self.num_steps + i
            x0, epsilon = self.predict(x + move, k, evaluate, c)
            return Transition(x + (move + c.to_x0[k] * x0 + c.to_epsilon[k] * epsilon) / 2)
        if i == 0 and self.last_step == "none":  # the loop adds none in the last step
            return Transition(x + move + c.std[i] * c.noise())
        return Transition(x + move, c.std[i])
