"""What a classifier is trained on: clean images or noisy ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib_guidance.noise_schedule import NoiseSchedule, named_betas
from calib_guidance.parameterization import diffuse


class Clean(nn.Module):
    """Images as they are, for a classifier that ignores time."""

    def forward(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, None]:
        return x0, None


class Noisy(nn.Module):
    """x_t ~ q(x_t | x0) with t uniform over the steps of the schedule (Dhariwal & Nichol 2021, section 4).

    Args:
        noise_schedule: ``linear`` or ``cosine``, that of the diffusion model to be guided.
        num_steps: length of that process.
    """

    def __init__(self, noise_schedule: str = "linear", num_steps: int = 1000):
        super().__init__()
        tables = NoiseSchedule(named_betas(noise_schedule, num_steps))
        self.register_buffer("alphas_cumprod", torch.tensor(tables.alphas_cumprod).float(), persistent=False)

    def forward(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noisy images ``(N, C, H, W)`` and their steps ``(N,)``."""
        t = torch.randint(len(self.alphas_cumprod), (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        return diffuse(x0, noise, self.alphas_cumprod[t].view(-1, 1, 1, 1)), t
