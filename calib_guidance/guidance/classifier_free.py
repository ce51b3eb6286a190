"""Classifier-free guidance (Ho & Salimans 2022), as a denoiser around a denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction, at_step
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.noise_schedule import NoiseLevels


class ClassifierFreeGuidance(Denoiser):
    """ε = ε_u + w·(ε_c − ε_u), alone or under any classifier guidance.

    Both predictions come from one pass over a doubled batch. The variance is the conditional one's.

    Args:
        denoiser: class-conditional, trained with label dropout.
        weight: w; 1 is the conditional model, 0 the unconditional one.
        schedule: interval outside which the conditional model is used alone; its γ must be 0.

    Raises:
        ValueError: a denoiser without classes, or a γ.
    """

    def __init__(self, denoiser: Denoiser, weight: float = 1.5, schedule: GuidanceSchedule | None = None):
        super().__init__()
        if denoiser.num_classes is None:
            raise ValueError("classifier-free guidance needs a class-conditional denoiser (class_conditional: true)")
        if not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight}")
        if schedule is not None and schedule.gamma:
            raise ValueError("classifier-free guidance has no sine factor: set its schedule's gamma to 0")
        self.denoiser, self.weight, self.interval = denoiser, weight, schedule or GuidanceSchedule()
        self.schedule, self.image_shape, self.clip = denoiser.schedule, denoiser.image_shape, denoiser.clip
        self.num_classes, self.has_learned_variance = denoiser.num_classes, denoiser.has_learned_variance
        self.evaluations = 2 * denoiser.evaluations

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)

    def trajectory(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is None:
            raise ValueError("classifier-free guidance needs labels")
        conditional = self.denoiser.trajectory(levels, y)
        both = self.denoiser.trajectory(levels, torch.cat([y, torch.full_like(y, -1)]))
        active = self.interval.active(levels)
        actives = torch.tensor(active, device=y.device)
        # x̂0 is linear in ε with the slope −σ, so ε_c − ε_u is the difference of the x̂0 over that.
        to_noise = torch.tensor(-self.weight / levels.sigmas, device=y.device).float().masked_fill(~actives, 0.0)

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            each = isinstance(i, Tensor)
            if not each and not active[i]:
                return conditional(x_t, i)
            x0, variance, _ = both(torch.cat([x_t, x_t]), torch.cat([i, i]) if each else i)
            x0_c, x0_u = x0.chunk(2)
            difference = x0_c - x0_u
            guided = x0_u + self.weight * difference
            return Prediction(
                torch.where(at_step(actives, i), guided, x0_c) if each else guided,
                None if variance is None else variance.chunk(2)[0],
                at_step(to_noise, i) * difference,
            )

        return predict
