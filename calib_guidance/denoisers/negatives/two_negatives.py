"""Two negatives at once, such as those of classifier-free guidance and of autoguidance."""

from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.negatives.base import Alone, Negative, Pair, PredictAlone, PredictPair
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers


class TwoNegatives(Negative):
    """u = (1 − f)·u₁ + f·u₂, so that each negative has a weight of its own.

    Under classifier-free guidance of weight w the result is c + s₁·(c − u₁) + s₂·(c − u₂) with s₁ = (1 − f)·(w − 1) and
    s₂ = f·(w − 1). Two given weights are w = 1 + s₁ + s₂ and f = s₂/(s₁ + s₂). Either negative may be a TwoNegatives again. One
    evaluation more than with ``first`` alone.

    Published for EDM2-512: a weaker model with s₁ = 1.2 and sliding windows, not masked, with s₂ = 0.14 (arXiv 2411.10257).

    Args:
        first: u₁.
        second: u₂.
        fraction: f, 0 ≤ f ≤ 1.

    Examples:
        >>> import torch
        >>> from calib_guidance.denoisers import Autoguidance, Combination, GaussianMixture, Unconditional
        >>> model, weak = (
        ...     GaussianMixture(means=[[-mean], [mean]], covariances=[0.01, 0.01], class_conditional=True)
        ...     for mean in (2.0, 1.0)
        ... )
        >>> combined = Combination(model, negative=TwoNegatives(Unconditional(), Autoguidance(weak)))
        >>> x0 = combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0  # 0.5 + 1.5·(2 − 0.5) of pure noise
        >>> round(float(x0), 2), combined.nfe
        (2.75, 3)
    """

    def __init__(self, first: Negative, second: Negative, fraction: float = 0.5):
        super().__init__()
        check_numbers(least=0, most=1, fraction=fraction)
        self.first, self.second, self.fraction = first, second, fraction

    def check(self, denoiser: Denoiser) -> None:
        self.first.check(denoiser)
        self.second.check(denoiser)

    def nfe(self, denoiser: Denoiser) -> int:
        return self.first.nfe(denoiser) + self.second.nfe_alone(denoiser)

    def nfe_alone(self, denoiser: Denoiser) -> int:
        return self.first.nfe_alone(denoiser) + self.second.nfe_alone(denoiser)

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        pair, second = self.first.prepare(denoiser, levels, y), self.second.prepare_alone(denoiser, levels, y)
        return _Both(pair, second, self.fraction)

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        first, second = (part.prepare_alone(denoiser, levels, y) for part in (self.first, self.second))

        def predict(x_t: Tensor, i: int | Tensor, cond: Prediction) -> Prediction:
            return _mean(first(x_t, i, cond), second(x_t, i, cond), self.fraction)

        return Alone(predict, lambda x: _start((first, second), x))


class _Both:
    def __init__(self, pair: PredictPair, second: PredictAlone, fraction: float):
        self._pair, self._second, self._fraction = pair, second, fraction

    def start(self, x: Tensor) -> None:
        _start((self._pair, self._second), x)

    def __call__(self, x_t: Tensor, i: int | Tensor) -> Pair:
        cond, first = self._pair(x_t, i)
        return cond, _mean(first, self._second(x_t, i, cond), self._fraction)


def _mean(first: Prediction, second: Prediction, fraction: float) -> Prediction:
    return first._replace(x0=first.x0 + fraction * (second.x0 - first.x0))


def _start(parts: tuple[object, object], x: Tensor) -> None:
    for part in parts:
        getattr(part, "start", lambda x: None)(x)
