"""Flow matching (Lipman et al. 2023, arXiv 2210.02747; Ma et al. 2024, arXiv 2401.08740)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from calib_guidance.diffusion.paths import TimeDirection
from calib_guidance.errors import check_choice
from calib_guidance.training.objective import Objective

Path = Literal["linear", "gvp"]
Times = Literal["uniform", "logit_normal"]


class FlowMatching(Objective):
    """Mean squared error on the velocity dx/dt of x_τ = α·x0 + σ·ε.

    Args:
        path: ``linear`` or ``gvp``, see :mod:`calib_guidance.diffusion.paths`.
        time_direction: of the network's t, see :class:`~calib_guidance.denoisers.FlowDenoiser`.
        time_scale: what t in [0, 1] is multiplied with for the network; 1000 suits ADM's embedding.
        times: law of τ: ``uniform``, or ``logit_normal`` with ``mean`` and ``std`` (Esser et al. 2024).

    Examples:
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t, y):
        ...         return torch.zeros_like(x)
        >>> x0, noise = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 3.0)
        >>> FlowMatching()(Zero(), x0, None, torch.tensor([0.5]), noise)  # (3 − 1)²
        tensor([4.])
    """

    def __init__(
        self,
        path: Path = "linear",
        time_direction: TimeDirection = "data_to_noise",
        time_scale: float = 1000.0,
        times: Times = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
    ):
        check_choice("path", path, get_args(Path))
        check_choice("time_direction", time_direction, get_args(TimeDirection))
        check_choice("times", times, get_args(Times))
        if not (time_scale > 0 and std > 0):
            raise ValueError(f"time_scale and std must be above 0, got {time_scale} and {std}")
        self.path, self.time_direction, self.time_scale = path, time_direction, float(time_scale)
        self.times, self.mean, self.std = times, mean, std
        # What FlowDenoiser is told by the weights.
        self.metadata = {"prediction": "velocity", "path": path, "time_direction": time_direction}
        self.metadata |= {"time_scale": self.time_scale}

    def check(self, network: nn.Module) -> None:
        channels, out = getattr(network, "in_channels", None), getattr(network, "out_channels", None)
        if None not in (channels, out) and out not in (channels, 2 * channels):  # a module of one's own need not tell
            raise ValueError(f"out_channels must be in_channels ({channels}), got {out}")

    def quantile(self, u: Tensor) -> Tensor:
        """τ below which a fraction ``u`` of training lies."""
        return u if self.times == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def __call__(self, network: nn.Module, x0: Tensor, y: Tensor | None, level: Tensor, noise: Tensor) -> Tensor:
        at = level.view(-1, 1, 1, 1)
        if self.path == "linear":
            x, velocity = (1 - at) * x0 + at * noise, noise - x0
        else:
            cos, sin = torch.cos(math.pi / 2 * at), torch.sin(math.pi / 2 * at)
            x, velocity = cos * x0 + sin * noise, math.pi / 2 * (cos * noise - sin * x0)
        t = level
        if self.time_direction == "noise_to_data":
            t, velocity = 1 - level, -velocity
        output = network(x, self.time_scale * t, y)
        return (output[:, : x0.shape[1]] - velocity).square().flatten(1).mean(1)
