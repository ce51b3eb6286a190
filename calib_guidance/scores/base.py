"""What every score is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def as_float(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: scores and their gradients are never computed in half precision."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Score(nn.Module, ABC):
    """``score(logits, y, time) -> (N,)``: one value per sample, higher where the sample is more of its class.

    Guidance climbs its gradient. ``logits`` are ``(N, K)``, ``y`` ``(N,)``; ``time`` is the share of the trajectory still to
    go, from 1 at pure noise to 0 at the image, which only scores with a schedule use.

    ``group_size`` is the number of neighbouring samples whose scores depend on each other.
    """

    group_size: int = 1

    @abstractmethod
    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor: ...
