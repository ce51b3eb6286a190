"""What a diffusion model is trained with in place of ε, v and x0."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Objective(ABC):
    """A loss at noise levels that it draws itself.

    Attributes:
        metadata: what the exported weights say of it.
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
