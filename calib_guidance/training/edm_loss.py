"""The loss of EDM and EDM2 (Karras et al. 2022, arXiv 2206.00364, Section 5; 2024, arXiv 2312.02696, Eq. 22)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib_guidance.errors import check_numbers
from calib_guidance.training.objective import Objective


class EDMLoss(Objective):
    """The loss of EDM and EDM2.

    Weighted squared error of D(x; σ) = c_skip·x + c_out·F(c_in·x, ln σ/4) at σ = exp(mean + std·z), z ~ N(0, 1).

    λ(σ) = (σ² + σ_d²)/(σ·σ_d)² gives every σ the same loss at the start. With ``uncertainty`` the loss is λ/exp(u)·|D − x0|² + u,
    whose u(σ) the network learns: it goes to the logarithm of the weighted error at σ, so that every σ keeps the same
    gradient. Of :class:`~calib_guidance.networks.EDM2UNet`, whose weights are normalized in training.
    :class:`~calib_guidance.denoisers.EDM2Denoiser` and :class:`~calib_guidance.denoisers.EDMDenoiser` sample what was trained.

    Args:
        mean, std: of ln σ. Defaults are EDM2's, of ImageNet.
        sigma_data: σ_d, root mean square of the images in [-1, 1].
        uncertainty: whether to learn u(σ).

    Examples:
        >>> class Zero(nn.Module):  # F = 0, so D = c_skip·x
        ...     def forward(self, x, c_noise, y):
        ...         return torch.zeros_like(x)
        >>> loss = EDMLoss(uncertainty=False)
        >>> x0, noise, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([0.5])
        >>> loss(Zero(), x0, None, sigma, noise)  # λ·(σ/2)² with λ = 0.5/0.25²
        tensor([0.5000])
    """

    def __init__(self, mean: float = -0.4, std: float = 1.0, sigma_data: float = 0.5, uncertainty: bool = True):
        check_numbers(above=0, std=std, sigma_data=sigma_data)
        self.mean, self.std, self.sigma_data, self.uncertainty = mean, std, float(sigma_data), uncertainty
        self.metadata = {"sigma_data": self.sigma_data}

    def check(self, network: nn.Module) -> None:
        if network.out_channels != network.in_channels:
            raise ValueError(
                f"EDMLoss trains networks without variance: set out_channels to in_channels ({network.in_channels}), got "
                f"{network.out_channels}"
            )
        if self.uncertainty and not hasattr(network, "logvar"):
            raise ValueError(f"{type(network).__name__} has no uncertainty: set uncertainty to false, or take EDM2UNet")

    def quantile(self, u: Tensor) -> Tensor:
        """σ below which a fraction ``u`` of training lies."""
        smallest = torch.finfo(torch.float32).eps / 2  # a random 0 would be no noise at all
        return (self.mean + self.std * torch.special.ndtri(u.clamp(smallest, 1 - smallest))).exp()

    def __call__(self, network: nn.Module, x0: Tensor, y: Tensor | None, level: Tensor, noise: Tensor) -> Tensor:
        sigma, data = level.view(-1, 1, 1, 1), self.sigma_data
        total, x, c_noise = sigma**2 + data**2, x0 + sigma * noise, level.log() / 4
        output = network(x / total.sqrt(), c_noise, y)
        denoised = data**2 / total * x + sigma * data / total.sqrt() * output
        loss = (total / (sigma * data) ** 2 * (denoised - x0).square()).flatten(1).mean(1)
        if not self.uncertainty:
            return loss
        u = network.logvar(c_noise).flatten()
        return loss / u.exp() + u
