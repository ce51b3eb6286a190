"""Time step guidance, TSG (Sadat et al. 2024, arXiv 2407.02687)."""

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Predict
from calib_guidance.denoisers.negatives.attention import named_module
from calib_guidance.denoisers.negatives.base import RandomNegative
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers


class PerturbedTime(RandomNegative):
    """Time step guidance: the denoiser with a perturbed embedding of t.

    The embedding e becomes e + k·rms(e)·(t/(T − 1))^a·n, n ~ N(0, I) drawn again at every level.

    For models with and without labels whose denoiser embeds t once per trajectory (ADM, EDM, DiT). n follows from the sample's
    x_T. The source gives neither k nor a: these are to be tuned. Both predictions come from one doubled batch.

    Args:
        scale: k ≥ 0.
        exponent: a.
        embedding: name of the module that embeds t, as in ``denoiser.named_modules()`` or its end.

    Examples:
        >>> from calib_guidance.denoisers import ADMDenoiser, Combination
        >>> from calib_guidance.networks import UNet
        >>> network = UNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,))
        >>> combined = Combination(ADMDenoiser(network), negative=PerturbedTime(scale=0.5))  # no labels needed
        >>> combined.num_classes, combined.nfe
        (None, 2)
    """

    def __init__(self, scale: float = 1.0, exponent: float = 1.0, embedding: str = "time_embed"):
        super().__init__()
        check_numbers(scale=scale, exponent=exponent)
        self.scale, self.exponent, self.embedding = scale, exponent, embedding

    def check(self, denoiser: Denoiser) -> None:
        named_module(denoiser, self.embedding)

    def predictors(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor, both: bool) -> list[Predict]:
        first, rows = len(x) if both else 0, torch.cat([y, y]) if both else y
        module, numbers = named_module(denoiser, self.embedding), KeyedNumbers(x)
        own, calls, parts = torch.arange(len(rows), device=x.device), [], []
        for k, t in enumerate(levels.times):
            size = self.scale * (t / (levels.num_train_steps - 1)) ** self.exponent

            def perturb(module: nn.Module, args: object, e: Tensor, size: float = size, k: int = k) -> Tensor:
                calls.append(k)
                noise = numbers.normal(e.shape[1], stream=k).to(e.dtype)
                rms = e[first:].square().mean(dim=1, keepdim=True).sqrt()
                return torch.cat([e[:first], e[first:] + size * rms * noise])

            # Every sample has a level of its own, of the same t, and so an embedding of its own.
            with module.register_forward_hook(perturb):
                predict = denoiser.prepare(levels.select([k] * len(rows)), rows)
            parts.append(lambda x_t, i, predict=predict: predict(x_t, own))
        if len(calls) != len(parts):
            raise ValueError(f"{type(denoiser).__name__} does not embed t before sampling: take Unconditional")
        return parts
