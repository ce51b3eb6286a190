"""What a diffusion model is trained with in place of ε, v and x0."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Objective(ABC):
    """Base class of training objectives that draw their own noise levels.

    Attributes:
        metadata: what the exported weights say of it.

    Examples:
        >>> class Denoising(Objective):  # an objective of your own: x0 from x0 + σ·ε
        ...     metadata = {"prediction": "x0"}
        ...     def quantile(self, u):
        ...         return 10 * u
        ...     def __call__(self, network, x0, y, level, noise):
        ...         sigma = level.view(-1, 1, 1, 1)
        ...         return (network(x0 + sigma * noise, level, y) - x0).square().flatten(1).mean(1)
        ...     def check(self, network):
        ...         pass
        >>> import torch
        >>> x0, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> Denoising()(lambda x, t, y: x, x0, None, torch.tensor([3.0]), noise)
        tensor([9.])
    """

    metadata: dict[str, object]

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Noise level below which a fraction ``u`` of training lies."""

    @abstractmethod
    def __call__(self, network: nn.Module, x0: Tensor, y: Tensor | None, level: Tensor, noise: Tensor) -> Tensor:
        """Loss per sample ``(N,)`` of images ``(N, C, H, W)`` with their ``noise`` at ``level`` ``(N,)``."""

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Raise ValueError where the network cannot be trained so."""
