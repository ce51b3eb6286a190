"""Time step guidance, TSG (Sadat et al. 2024, arXiv 2407.02687)."""

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.attention import named_module
from calib_guidance.denoisers.negatives.base import PredictPair, RandomNegative, halves
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers


class PerturbedTime(RandomNegative):
    """The denoiser with a perturbed embedding of t: e + k·rms(e)·(t/(T − 1))^a·n, n ~ N(0, I) drawn again at every level.

    For models with and without labels whose denoiser embeds t once per trajectory (ADM, EDM, DiT). n follows from the sample's
    x_T. The source gives neither k nor a: these are to be tuned. Both predictions come from one doubled batch.

    Args:
        scale: k ≥ 0.
        exponent: a.
        embedding: name of the module that embeds t, as in ``denoiser.named_modules()`` or its end.
    """

    def __init__(self, scale: float = 1.0, exponent: float = 1.0, embedding: str = "time_embed"):
        super().__init__()
        check_numbers(scale=scale, exponent=exponent)
        self.scale, self.exponent, self.embedding = scale, exponent, embedding

    def check(self, denoiser: Denoiser) -> None:
        named_module(denoiser, self.embedding)

    def pairs(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor) -> list[PredictPair]:
        n, both, own = len(x), torch.cat([y, y]), torch.arange(2 * len(x), device=x.device)
        module, numbers = named_module(denoiser, self.embedding), KeyedNumbers(x)
        calls, pairs = [], []
        for k, t in enumerate(levels.times):
            size = self.scale * (t / (levels.num_train_steps - 1)) ** self.exponent

            def perturb(module: nn.Module, args: object, e: Tensor, size: float = size, k: int = k) -> Tensor:
                calls.append(k)
                noise = numbers.normal(e.shape[1], stream=k).to(e.dtype)
                rms = e[n:].square().mean(dim=1, keepdim=True).sqrt()
                return torch.cat([e[:n], e[n:] + size * rms * noise])

            # Every sample has a level of its own, of the same t, and so an embedding of its own.
            with module.register_forward_hook(perturb):
                predict = denoiser.prepare(levels.select([k] * 2 * n), both)
            pairs.append(lambda x_t, i, predict=predict: halves(predict(torch.cat([x_t, x_t]), own)))
        if len(calls) != len(pairs):
            raise ValueError(f"{type(denoiser).__name__} does not embed t before sampling: take Unconditional")
        return pairs
