"""What samplers of flow models share: their grids and coordinates (SiT, arXiv 2401.08740; REPA, arXiv 2410.06940)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import PathCoefficients, PathName, path_coefficients, path_time, shifted_time
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import PURE_NOISE, NoiseLevels
from calib_guidance.samplers.base import Sampler
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.spacing import levels_of_passes

IMAGE = 1e-5  # τ for 0, where x̂0 says nothing of the velocity


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

    clip_denoised, steps_vp = False, False

    def __init__(self, num_steps: int, path: PathName, shift: float, start: float, end: float):
        path_coefficients(path, 0.0)  # checks the name
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not (0 <= end < start <= 1 and shift > 0):
            raise ValueError(
                f"the grid needs 0 ≤ end < start ≤ 1 and shift > 0, got end={end}, start={start}, shift={shift}"
            )
        self.num_steps, self.shift, self.start_time, self.end = num_steps, shift, start, end
        self.path: PathName = path

    def grid(self, denoiser: Denoiser) -> np.ndarray:
        """τ of the ends of the steps, ``(N + 1,)``, least noisy first."""
        start = min(self.start_time, float(shifted_time(self.highest(denoiser), 1 / self.shift)))
        return shifted_time(np.linspace(start, self.end, self.num_steps + 1), self.shift)[::-1]

    def highest(self, denoiser: Denoiser) -> np.ndarray:
        return path_time(self.path, 1 / (1 + denoiser.max_sigma**2))

    def sigmas(self, tau: np.ndarray) -> np.ndarray:
        return np.minimum(path_coefficients(self.path, tau).ratio, PURE_NOISE)

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        return levels_of_passes(denoiser.schedule, self.sigmas(self.grid(denoiser)[1:]))

    def at(self, levels: NoiseLevels) -> tuple[np.ndarray, PathCoefficients]:
        """τ and the path's coefficients at levels."""
        tau = np.where(levels.sigmas > PURE_NOISE / 2, 1.0, path_time(self.path, levels.alphas_cumprod))
        return tau, path_coefficients(self.path, tau)

    def start(self, noise: Noise, levels: NoiseLevels) -> Tensor:
        return noise().double() * float(self.at(levels)[1].scale[-1])

    def to_vp(self, x: Tensor, i: int, c: SimpleNamespace) -> Tensor:
        return x if i < 0 else c.to_vp[i] * x

    def predict(self, x: Tensor, k: int, evaluate: Evaluate, c: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """x̂0 and ε at level ``k``."""
        x0 = evaluate(c.to_vp[k] * x, k).predicted().x0
        return x0, (x - c.alpha[k] * x0) / c.sigma[k]
