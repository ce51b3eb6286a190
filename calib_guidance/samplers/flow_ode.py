"""The ODE of flow models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import PathName, path_coefficients, shifted_time
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.samplers.base import Transition
from calib_guidance.samplers.encoding import FlowEncoder
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.flow import IMAGE
from calib_guidance.samplers.spacing import levels_of_passes

Method = Literal["euler", "heun"]


class FlowODE(FlowEncoder):
    """The ODE dx/dτ = v of a flow model, by Euler's or Heun's method; :meth:`encode` is its reverse.

    Args:
        num_steps: number of steps, one less than the points of the grid, which SiT and LightningDiT count.
        method: ``euler`` or ``heun``, which evaluates twice per step.
        correct_last: Heun's second evaluation in the last step too, at τ = 0 (SiT); otherwise that is an Euler step (REPA).
        interval_by: what decides about guidance in an interval: the start of the ``step`` (REPA), or every ``evaluation`` by its
            own τ (LightningDiT).
        zero_steps: first steps that do not move x, but are evaluated (CFG-Zero*, arXiv 2503.18886: 4 % of the steps).

    See :class:`~calib_guidance.samplers.flow.FlowSampler` for the others.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(FlowODE(num_steps=20)(model, noise, torch.tensor([0]))))
        3
    """

    def __init__(
        self,
        num_steps: int = 250,
        method: Method = "euler",
        path: PathName = "linear",
        shift: float = 1.0,
        start: float = 1.0,
        end: float = 0.0,
        correct_last: bool = False,
        interval_by: Literal["step", "evaluation"] = "step",
        zero_steps: int = 0,
    ):
        check_choice("method", method, get_args(Method))
        check_choice("interval_by", interval_by, ("step", "evaluation"))
        super().__init__(num_steps, path, shift, start, end)
        check_numbers(least=0, below=num_steps, zero_steps=zero_steps)
        self.method, self.correct_last = method, correct_last
        self.interval_by, self.zero_steps = interval_by, zero_steps

    def evaluated(self, denoiser: Denoiser) -> NoiseLevels:
        grid = np.maximum(self.grid(denoiser), IMAGE)
        passes = [grid[1:], grid[:-1]] if self.method == "heun" else [grid[1:]]
        levels = levels_of_passes(denoiser.schedule, *map(self.sigmas, passes))
        return levels if self.interval_by == "step" else levels._replace(start=np.arange(len(levels.start)))

    def nfe(self, denoiser: Denoiser) -> int:
        second = (self.num_steps - 1 + self.correct_last) * (self.method == "heun")
        return (self.num_steps + second) * denoiser.nfe

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        tau, _ = self.at(levels)
        following = np.append(float(shifted_time(np.array(self.end), self.shift)), tau[:-1])
        # Of step i: its level at i, and with Heun where it leads at N + i.
        c = path_coefficients(self.path, np.concatenate([tau, np.maximum(following, IMAGE)]))
        tables = {name: getattr(c, name) for name in ("alpha", "sigma", "d_alpha", "d_sigma")}
        h = (following - tau) * (np.arange(len(tau)) < len(tau) - self.zero_steps)
        return tables | {"to_vp": 1 / c.scale, "h": h}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        first = self._velocity(x, i, evaluate, c)
        x_next = x + c.h[i] * first
        if self.method == "heun" and (i or self.correct_last):
            x_next = x + c.h[i] * (first + self._velocity(x_next, self.num_steps + i, evaluate, c)) / 2
        return Transition(x_next)

    def _velocity(self, x: Tensor, k: int, evaluate: Evaluate, c: SimpleNamespace) -> Tensor:
        x0, epsilon = self.predict(x, k, evaluate, c)
        return c.d_alpha[k] * x0 + c.d_sigma[k] * epsilon

    def advance(self, x: Tensor, start: float, end: float, evaluate: Evaluate) -> Tensor:
        first = self.velocity_at(start, x, evaluate)
        x_next = x + (end - start) * first
        if self.method == "heun":
            return x + (end - start) / 2 * (first + self.velocity_at(end, x_next, evaluate))
        return x_next
