"""Samplers of flow models, on their own grids (SiT, arXiv 2401.08740; REPA, arXiv 2410.06940)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import PathCoefficients, PathName, path_coefficients, path_time, shifted_time
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice
from calib_guidance.samplers.base import Sampler, Transition
from calib_guidance.samplers.evaluate import PURE_NOISE, Evaluate
from calib_guidance.samplers.spacing import levels_of_passes

Method = Literal["euler", "heun"]
DiffusionForm = Literal["sigma", "linear", "constant", "decreasing", "sbdm"]
LastStep = Literal["mean", "euler", "tweedie", "none"]
_IMAGE = 1e-5  # τ for 0, where x̂0 says nothing of the velocity


class FlowSampler(Sampler):
    """A sampler of x_τ = α·x0 + σ·ε in float64, from noise at τ = 1 to the image at τ = 0.

    Runs on every denoiser: v = α'·x̂0 + σ'·ε and score −ε/σ follow from x̂0. A model that does not know pure noise starts at its
    largest σ.

    Args:
        num_steps: number of steps.
        path: ``linear``, ``gvp`` or ``vp``.
        shift: s, moves the grid to s·τ/(1 + (s − 1)·τ); above 1 to noise.
        start, end: τ of the first and of the last point of the grid, before the shift.
    """

    clip_denoised = False

    def __init__(self, num_steps: int, path: PathName, shift: float, start: float, end: float):
        path_coefficients(path, 0.0)  # checks the name
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not (0 <= end < start <= 1 and shift > 0):
            raise ValueError(
                f"the grid needs 0 ≤ end < start ≤ 1 and shift > 0, got end={end}, start={start}, shift={shift}"
            )
        self.num_steps, self.path, self.shift, self.start_time, self.end = num_steps, path, shift, start, end

    def grid(self, denoiser: Denoiser) -> np.ndarray:
        """τ of the ends of the steps, ``(N + 1,)``, least noisy first."""
        start = min(self.start_time, float(shifted_time(self._highest(denoiser), 1 / self.shift)))
        return shifted_time(np.linspace(start, self.end, self.num_steps + 1), self.shift)[::-1]

    def _highest(self, denoiser: Denoiser) -> np.ndarray:
        return path_time(self.path, 1 / (1 + denoiser.max_sigma**2))

    def _sigmas(self, tau: np.ndarray) -> np.ndarray:
        return np.minimum(path_coefficients(self.path, tau).ratio, PURE_NOISE)

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return levels_of_passes(denoiser.schedule, self._sigmas(self.grid(denoiser)[1:]))

    def at(self, levels: NoiseLevels) -> tuple[np.ndarray, PathCoefficients]:
        """τ and the path's coefficients at levels."""
        tau = np.where(levels.sigmas > PURE_NOISE / 2, 1.0, path_time(self.path, levels.alphas_cumprod))
        return tau, path_coefficients(self.path, tau)

    def start(self, noise: Noise, levels: NoiseLevels) -> Tensor:
        return noise().double() * float(self.at(levels)[1].scale[-1])

    def to_vp(self, x: Tensor, i: int, c: SimpleNamespace) -> Tensor:
        return x if i < 0 else c.to_vp[i] * x

    def _epsilon(self, x: Tensor, k: int, evaluate: Evaluate, c: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """x̂0 and ε at level ``k``."""
        x0 = evaluate(c.to_vp[k] * x, k).prediction.x0
        return x0, (x - c.alpha[k] * x0) / c.sigma[k]


class FlowODE(FlowSampler):
    """The ODE dx/dτ = v of a flow model, by Euler's or Heun's method.

    Args:
        num_steps: number of steps, one less than the points of the grid, which SiT and LightningDiT count.
        method: ``euler`` or ``heun``, which evaluates twice per step.
        correct_last: Heun's second evaluation in the last step too, at τ = 0 (SiT); otherwise that is an Euler step (REPA).
        interval_by: what decides about guidance in an interval: the start of the ``step`` (REPA), or every ``evaluation`` by its
            own τ (LightningDiT).

    See :class:`FlowSampler` for the others.
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
    ):
        check_choice("method", method, get_args(Method))
        check_choice("interval_by", interval_by, ("step", "evaluation"))
        super().__init__(num_steps, path, shift, start, end)
        self.method, self.correct_last, self.interval_by = method, correct_last, interval_by

    def evaluated(self, denoiser: Denoiser) -> NoiseLevels:
        grid = np.maximum(self.grid(denoiser), _IMAGE)
        passes = [grid[1:], grid[:-1]] if self.method == "heun" else [grid[1:]]
        levels = levels_of_passes(denoiser.schedule, *map(self._sigmas, passes))
        return levels if self.interval_by == "step" else levels._replace(start=np.arange(len(levels.start)))

    def nfe(self, denoiser: Denoiser) -> int:
        second = (self.num_steps - 1 + self.correct_last) * (self.method == "heun")
        return (self.num_steps + second) * denoiser.nfe

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        tau, _ = self.at(levels)
        end = float(shifted_time(np.array(self.end), self.shift))
        following = np.append(end, tau[:-1])
        # Of step i: its level at i, and with Heun where it leads at N + i.
        c = path_coefficients(self.path, np.concatenate([tau, np.maximum(following, _IMAGE)]))
        tables = {name: getattr(c, name) for name in ("alpha", "sigma", "d_alpha", "d_sigma")}
        return tables | {"to_vp": 1 / c.scale, "h": following - tau}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        first = self._velocity(x, i, evaluate, c)
        x_next = x + c.h[i] * first
        if self.method == "heun" and (i or self.correct_last):
            x_next = x + c.h[i] * (first + self._velocity(x_next, self.num_steps + i, evaluate, c)) / 2
        return Transition(x_next)

    def _velocity(self, x: Tensor, k: int, evaluate: Evaluate, c: SimpleNamespace) -> Tensor:
        x0, epsilon = self._epsilon(x, k, evaluate, c)
        return c.d_alpha[k] * x0 + c.d_sigma[k] * epsilon


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
        start = min(self.start_time, float(self._highest(denoiser)))
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
        x0, epsilon = self._epsilon(x, i, evaluate, c)
        if i == 0 and self.last_step == "tweedie":
            return Transition(x0)
        mean = x + c.to_x0[i] * x0 + c.to_epsilon[i] * epsilon
        if i == 0 and self.last_step == "none":  # the loop adds none in the last step
            return Transition(mean + c.std[i] * c.noise())
        return Transition(mean, c.std[i])
