"""Classifier-free guidance (Ho & Salimans 2022), as a denoiser around a denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction, at_step
from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.schedules import NoiseLevels


class ClassifierFreeGuidance(Denoiser):
    """ε = ε_u + w·(ε_c − ε_u), alone or under any classifier guidance.

    Both predictions come from one pass over a doubled batch, or where ``negative`` is given from one pass of each model. The
    variance is the conditional one's.

    Args:
        denoiser: class-conditional, trained with label dropout; with a ``negative``, any.
        weight: w; 1 is the conditional model, 0 the unconditional one.
        interval: outside it the conditional model is used alone.
        channels: how many of the first channels are guided, the others being the conditional model's; None guides all. The
            published samples of DiT guide 3 of its 4.
        negative: a model whose prediction stands for ε_u: with ``negative_labels``, one that is smaller or less trained, which
            is autoguidance (Karras et al. 2024, arXiv 2406.02507); without, an unconditional one or one given no label.
        negative_labels: give ``negative`` the classes too.

    Raises:
        ValueError: a denoiser without classes, a number of channels that it does not have, or a negative of other images
            or classes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float = 1.5,
        interval: Interval | None = None,
        channels: int | None = None,
        negative: Denoiser | None = None,
        negative_labels: bool = False,
    ):
        super().__init__()
        if denoiser.num_classes is None and negative is None:
            raise ValueError("classifier-free guidance needs a class-conditional denoiser (class_conditional: true)")
        if negative_labels and negative is None:
            raise ValueError(
                "negative_labels: true, but there is no negative: name the weaker model, or leave it false"
            )
        if negative is not None and negative.image_shape != denoiser.image_shape:
            raise ValueError(f"the negative samples {negative.image_shape}, the denoiser {denoiser.image_shape}")
        if negative_labels and negative.num_classes != denoiser.num_classes:
            raise ValueError(
                f"the negative knows {negative.num_classes} classes, the denoiser {denoiser.num_classes}: their labels "
                "differ, so set negative_labels to false, or name a negative of the same classes"
            )
        if channels is not None and not 1 <= channels <= denoiser.image_shape[0]:
            raise ValueError(f"channels must be 1 … {denoiser.image_shape[0]}, or null for all, got {channels}")
        if not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight}")
        self.denoiser, self.weight, self.interval = denoiser, weight, interval or Interval()
        self.schedule, self.image_shape, self.clip = denoiser.schedule, denoiser.image_shape, denoiser.clip
        self.num_classes, self.has_learned_variance = denoiser.num_classes, denoiser.has_learned_variance
        self.channels, self.negative, self.negative_labels = channels, negative, negative_labels
        self.evaluations = denoiser.evaluations + (negative or denoiser).evaluations

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)

    def trajectory(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is None:
            raise ValueError("classifier-free guidance needs labels")
        conditional = self.denoiser.trajectory(levels, y)
        none = torch.full_like(y, -1)
        if self.negative is None:
            both = self.denoiser.trajectory(levels, torch.cat([y, none]))
        else:
            negative = self.negative.trajectory(levels, y if self.negative_labels else none)
        guided_channels = torch.arange(self.image_shape[0], device=y.device) < (self.channels or self.image_shape[0])
        guided_channels = guided_channels.view(-1, 1, 1)
        active = self.interval.active(levels)
        actives = torch.tensor(active, device=y.device)
        # x̂0 is linear in ε with the slope −σ, so ε_c − ε_u is the difference of the x̂0 over that.
        to_noise = torch.tensor(-self.weight / levels.sigmas, device=y.device).float().masked_fill(~actives, 0.0)

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            each = isinstance(i, Tensor)
            if not each and not active[i]:
                return conditional(x_t, i)
            if self.negative is None:
                x0, variance, _ = both(torch.cat([x_t, x_t]), torch.cat([i, i]) if each else i)
                x0_c, x0_u = x0.chunk(2)
                variance = None if variance is None else variance.chunk(2)[0]
            else:
                x0_c, variance, _ = conditional(x_t, i)
                x0_u = negative(x_t, i).x0
            difference = x0_c - x0_u
            guided = x0_u + self.weight * difference
            return Prediction(
                torch.where(at_step(actives, i) & guided_channels, guided, x0_c),
                variance,
                at_step(to_noise, i) * difference * guided_channels,
            )

        return predict
