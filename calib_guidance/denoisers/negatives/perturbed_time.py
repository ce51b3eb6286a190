"""Time step guidance, TSG (Sadat et al. 2024, arXiv 2407.02687)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.attention import named_module
from calib_guidance.denoisers.negatives.base import ByLevel, Negative, PredictPair, halves
from calib_guidance.denoisers.rules.base import check_finite
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels


class PerturbedTime(Negative):
    """The denoiser with a perturbed embedding of t: e + k·rms(e)·(t/(T − 1))^a·n, n ~ N(0, I) anew at every level.

    For models with and without labels whose denoiser embeds t once per trajectory (ADM, EDM, DiT). n follows from the sample's
    x_T. The source gives neither k nor a: these are to be tuned. Both predictions come from one doubled batch.

    Args:
        scale: k ≥ 0.
        exponent: a.
        embedding: name of the module that embeds t, as in ``denoiser.named_modules()`` or its end.
    """

    def __init__(self, scale: float = 1.0, exponent: float = 1.0, embedding: str = "time_embed"):
        super().__init__()
        check_finite(scale=scale, exponent=exponent)
        self.scale, self.exponent, self.embedding = scale, exponent, embedding

    def check(self, denoiser: Denoiser) -> None:
        named_module(denoiser, self.embedding)

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return _RandomTimes(denoiser, levels, y, self)


class _RandomTimes(ByLevel):
    def __init__(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, negative: PerturbedTime):
        super().__init__(denoiser, levels, y)
        self._negative = negative

    def start(self, x: Tensor) -> None:
        n, both, own = len(x), torch.cat([self.y, self.y]), torch.arange(2 * len(x), device=x.device)
        module = named_module(self.denoiser, self._negative.embedding)
        calls: list[int] = []
        numbers = KeyedNumbers(x)
        for k, t in enumerate(self.levels.times):
            size = self._negative.scale * (t / (self.levels.num_train_steps - 1)) ** self._negative.exponent

            def perturb(module: nn.Module, args: object, e: Tensor, size: float = size, k: int = k) -> Tensor:
                calls.append(k)
                noise = numbers.normal(e.shape[1], stream=k).to(e.dtype)
                rms = e[n:].square().mean(dim=1, keepdim=True).sqrt()
                return torch.cat([e[:n], e[n:] + size * rms * noise])

            # Every sample has a level of its own, of the same t, and so an embedding of its own.
            with module.register_forward_hook(perturb):
                predict = self.denoiser.prepare(self.levels.select([k] * 2 * n), both)
            self._pairs.append(lambda x_t, i, predict=predict: halves(predict(torch.cat([x_t, x_t]), own)))
        if len(calls) != len(self._pairs):
            raise ValueError(
                f"{type(self.denoiser).__name__} does not embed t before sampling, so that PerturbedTime cannot change it: take "
                "another negative"
            )
