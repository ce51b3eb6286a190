"""What a negative is."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels

Pair = tuple[Prediction, Prediction]
PredictPair = Callable[[Tensor, int | Tensor], Pair]


class Negative(nn.Module, ABC):
    """What stands for the unconditional prediction."""

    needs_labels: bool = False  # whether the denoiser has to be class-conditional

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError where it cannot be the negative of this denoiser."""
        if self.needs_labels and denoiser.num_classes is None:
            raise ValueError(f"{type(self).__name__} needs a class-conditional denoiser (class_conditional: true)")

    def nfe(self, denoiser: Denoiser) -> int:
        """NFE of a conditional prediction and its negative; two by default."""
        return 2 * denoiser.nfe

    @abstractmethod
    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        """``predict_pair(x_t, i)``: the conditional prediction and the negative one, see :meth:`Denoiser.prepare`.

        It may offer ``start(x)``, which is called once with x_T, for random numbers of each sample
        (:class:`~calib_guidance.diffusion.rng.KeyedNumbers`).
        """


def halves(prediction: Prediction) -> Pair:
    """The two predictions of a doubled batch."""
    first, second = zip(*((None, None) if value is None else value.chunk(2) for value in prediction), strict=True)
    return Prediction(*first), Prediction(*second)


def doubled(predict: Predict) -> PredictPair:
    """The pair of a prediction for twice as many samples, the conditional ones first."""
    return lambda x_t, i: halves(predict(torch.cat([x_t, x_t]), torch.cat([i, i]) if isinstance(i, Tensor) else i))


class RandomNegative(Negative):
    """A negative with new random numbers at every level: each level is prepared by itself, once x_T is known."""

    @abstractmethod
    def pairs(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor) -> list[PredictPair]:
        """One for each level, with random numbers that follow from ``x``, x_T."""

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return _ByLevel(lambda x: self.pairs(denoiser, levels, y, x))


class _ByLevel:
    def __init__(self, pairs: Callable[[Tensor], list[PredictPair]]):
        self._prepare, self._pairs = pairs, []

    def start(self, x: Tensor) -> None:
        self._pairs = self._prepare(x)

    def __call__(self, x_t: Tensor, i: int | Tensor) -> Pair:
        if isinstance(i, Tensor):
            raise ValueError("a random negative needs all samples at the same step: take Unconditional")
        return self._pairs[i](x_t, i)
