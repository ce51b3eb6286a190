"""One interface over every diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule


class Prediction(NamedTuple):
    """What a denoiser says of x_t.

    Attributes:
        x0: ``(N, C, H, W)`` estimate of the clean image, not clipped.
        variance_fraction: ``(N, C, H, W)`` place of the reverse step's log-variance between the posterior's (0) and that of
            β (1), not clamped; None where the variance is not learned.
        cfg_residual: ``(N, C, H, W)`` conditional minus unconditional noise prediction, times the guidance weight; only
            of classifier-free guidance.
    """

    x0: Tensor
    variance_fraction: Tensor | None = None
    cfg_residual: Tensor | None = None


Predict = Callable[[Tensor, int | Tensor], Prediction]


def at_step(table: Tensor, i: int | Tensor) -> Tensor:
    """Entry ``i`` of a table ``(T,)``: one number, or where ``i`` is ``(N,)`` one per sample, ``(N, 1, 1, 1)``."""
    return table[i].view(-1, 1, 1, 1) if isinstance(i, Tensor) else table[i]


class Denoiser(nn.Module, ABC):
    """A diffusion model in the coordinates x_t = √ᾱ·x0 + √(1−ᾱ)·ε, whatever its network's own are.

    Attributes:
        schedule: of the full process, which says what t means; discrete samplers respace it.
        image_shape: ``(C, H, W)`` of x_t.
        num_classes: number of labels that it understands, or None where it understands none.
        clip: whether x̂0 is an image, which samplers may clip to [-1, 1].
        has_learned_variance: whether predictions carry a ``variance_fraction``.
        evaluations: of a network that one prediction takes.
    """

    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    num_classes: int | None
    clip: bool = True
    has_learned_variance: bool = False
    evaluations: int = 1

    @abstractmethod
    def trajectory(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        """The model along one trajectory, with all that does not depend on x_t computed here, once.

        Args:
            levels: noise levels, in any order.
            y: ``(N,)`` labels, -1 for none; None for none at all.

        Returns:
            ``predict(x_t, i)``, the prediction for ``x_t`` ``(N, C, H, W)`` at level ``i``. Samplers take all samples
            through the same step and give ``i`` as a number; a long tensor ``(N,)``, on the device of ``x_t``, gives every
            sample a step of its own (``cfg_residual`` is then 0, not None, for samples where it is off).
        """

    def decode(self, x0: Tensor) -> Tensor:
        """Images of what the model denoises; the same, outside latent models."""
        return x0
