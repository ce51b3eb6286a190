"""What a negative is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels

Pair = tuple[Prediction, Prediction]
PredictPair = Callable[[Tensor, int | Tensor], Pair]
PredictAlone = Callable[[Tensor, int | Tensor, Prediction], Prediction]


class Negative(nn.Module, ABC):
    """Base class of negatives: what stands for the unconditional prediction.

    Examples:
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> class FirstClass(Negative):  # a negative of your own: away from class 0
        ...     needs_labels = True
        ...     def prepare(self, denoiser, levels, y):
        ...         return doubled(denoiser.prepare(levels, torch.cat([y, torch.zeros_like(y)])))
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> combined = Combination(model, negative=FirstClass())  # x̂0 = −2 + 1.5·(2 − (−2)) of pure noise
        >>> round(float(combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0), 1)
        4.0
    """

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

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        """``predict(x_t, i, cond)``: the negative prediction where the conditional one is known; it may offer ``start(x)`` too.

        By default that of :meth:`prepare`, which evaluates the conditional prediction again.
        """
        pair = self.prepare(denoiser, levels, y)
        return Alone(lambda x_t, i, cond: pair(x_t, i)[1], getattr(pair, "start", None))

    def nfe_alone(self, denoiser: Denoiser) -> int:
        """NFE of :meth:`prepare_alone`."""
        again = type(self).prepare_alone is Negative.prepare_alone
        return self.nfe(denoiser) - (0 if again else denoiser.nfe)


class Alone:
    """``predict`` that is told x_T by ``start``."""

    def __init__(self, predict: PredictAlone, start: Callable[[Tensor], None] | None = None):
        self._predict, self._start = predict, start

    def start(self, x: Tensor) -> None:
        if self._start is not None:
            self._start(x)

    def __call__(self, x_t: Tensor, i: int | Tensor, cond: Prediction) -> Prediction:
        return self._predict(x_t, i, cond)


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
    def predictors(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor, both: bool) -> list[Predict]:
        """One for each level, of the negative samples, after as many conditional ones where ``both``.

        Random numbers follow from ``x``, x_T.
        """

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return _ByLevel(lambda x: [doubled(part) for part in self.predictors(denoiser, levels, y, x, True)])

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        predict = _ByLevel(lambda x: self.predictors(denoiser, levels, y, x, False))
        return Alone(lambda x_t, i, cond: predict(x_t, i), predict.start)


class _ByLevel:
    """Predictions, or pairs of them, by the number of the level."""

    def __init__(self, prepare: Callable[[Tensor], list[Any]]):
        self._prepare, self._levels = prepare, []

    def start(self, x: Tensor) -> None:
        self._levels = self._prepare(x)

    def __call__(self, x_t: Tensor, i: int | Tensor) -> Any:
        if isinstance(i, Tensor):
            raise ValueError("a random negative needs all samples at the same step: take Unconditional")
        return self._levels[i](x_t, i)
