"""What a negative is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels

PredictPair = Callable[[Tensor, int | Tensor], tuple[Prediction, Prediction]]


class Negative(nn.Module, ABC):
    """What stands for the unconditional prediction."""

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError where it cannot be the negative of this denoiser."""

    @abstractmethod
    def nfe(self, denoiser: Denoiser) -> int:
        """Number of network evaluations of a conditional prediction and its negative."""

    @abstractmethod
    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        """``predict_pair(x_t, i)``: the conditional prediction and the negative one, see :meth:`Denoiser.prepare`."""
