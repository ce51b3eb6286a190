"""What every classifier is to guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Classifier(nn.Module, ABC):
    """``classifier(x, t) -> logits``.

    ``x`` is ``(N, C, H, W)`` in [-1, 1] (a clean image or its estimate) or the noisy x_t, ``t`` ``(N,)`` the diffusion
    step on the 0 … 999 scale, which classifiers of clean images ignore. Logits are ``(N, num_classes)``.
    """

    num_classes: int

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor: ...

    def freeze(self) -> Classifier:
        """Make the classifier ready to guide: evaluation mode, no parameter gradients. Input gradients still flow."""
        return self.eval().requires_grad_(False)
