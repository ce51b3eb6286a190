"""The way back from an image to noise."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import cast

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import path_coefficients
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.flow import IMAGE, FlowSampler


class FlowEncoder(FlowSampler):
    """A deterministic flow sampler, which can be run backwards: :meth:`encode`."""

    @abstractmethod
    def advance(self, x: Tensor, start: float, end: float, evaluate: Evaluate) -> Tensor:
        """x_τ at ``end`` of ``x`` at ``start``, in either direction."""

    def velocity_at(self, tau: float, x: Tensor, evaluate: Evaluate, rows: slice = slice(None)) -> Tensor:
        """dx/dτ of some samples at a τ that is not one of the grid."""
        tau = max(tau, IMAGE)
        c = path_coefficients(self.path, tau)
        alpha, sigma, d_alpha, d_sigma, scale = map(float, (*c, c.scale))
        x0 = evaluate.at(float(self.sigmas(np.array(tau))), x, rows)(x / scale, 0).predicted().x0
        return d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma

    @torch.no_grad()
    def encode(
        self, denoiser: Denoiser, images: Tensor, y: Tensor | None = None, guidance: Guidance | None = None
    ) -> Tensor:
        """Noise ``(N, C, H, W)`` that this ODE takes to ``images`` (or latents), by the same steps from the image to noise.

        Args:
            denoiser: the diffusion model, which must know pure noise where the grid starts there.
            images: ``(N, C, H, W)``.
            y: ``(N,)`` classes.
            guidance: as in sampling.
        """
        grid, x, labels = self.grid(denoiser), images.double(), cast(Tensor, y)
        evaluate = Evaluate(self, denoiser, guidance, labels, x)
        for start, end in itertools.pairwise(grid.tolist()):
            x = self.advance(x, start, end, evaluate)
        return (x / float(path_coefficients(self.path, grid[-1]).scale)).float()
