"""Combined predictions: classifier-free guidance and its relatives, as a denoiser around a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, DenoiserWrapper, Predict, Prediction, at_step
from calib_guidance.denoisers.negatives import Negative, Unconditional
from calib_guidance.denoisers.rules import ClassifierFreeGuidance, Level, Rule
from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.schedules import NoiseLevels


class Combination(DenoiserWrapper):
    """A rule applied to a denoiser's prediction and a negative one, alone or under classifier guidance.

    The variance is the conditional one's.

    Args:
        denoiser: predicts with the label.
        rule: how the two predictions are combined; classifier-free guidance by default.
        negative: what stands for the unconditional prediction; by default the same denoiser without label.
        interval: outside it the conditional prediction is used alone; everywhere by default.
        channels: how many of the first channels are combined, the others being the conditional prediction's; None combines
            all. DiT's published samples combine 3 of 4.

    Raises:
        ValueError: a negative that does not fit the denoiser, or a number of channels that it does not have.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rule: Rule | None = None,
        negative: Negative | None = None,
        interval: Interval | None = None,
        channels: int | None = None,
    ):
        super().__init__(denoiser)
        if channels is not None and not 1 <= channels <= self.image_shape[0]:
            raise ValueError(f"channels must be 1 … {self.image_shape[0]}, or null for all, got {channels}")
        self.rule, self.negative = rule or ClassifierFreeGuidance(), negative or Unconditional()
        self.negative.check(denoiser)
        self.interval, self.channels = interval or Interval(), channels
        self.nfe = self.negative.nfe(denoiser)

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is None:
            raise ValueError("a combination of predictions needs labels: give y, -1 for none")
        conditional = self.denoiser.prepare(levels, y)
        predict_pair = self.negative.prepare(self.denoiser, levels, y)
        active = self.interval.active(levels)
        tables = (active, levels.times, levels.alphas_cumprod, levels.sigmas)
        actives, *tables = (torch.as_tensor(table, device=y.device) for table in tables)
        tables = [table.float() for table in tables]
        combined_channels = torch.arange(self.image_shape[0], device=y.device) < (self.channels or self.image_shape[0])
        combined_channels = combined_channels.view(-1, 1, 1)
        state: dict[str, Tensor] = {}

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            if not isinstance(i, Tensor) and not active[i]:
                return conditional(x_t, i)
            cond, uncond = predict_pair(x_t, i)
            x0 = self.rule(cond.x0, uncond.x0, Level(x_t, *(at_step(table, i) for table in tables)), state)
            on = at_step(actives, i) & combined_channels
            return Prediction(torch.where(on, x0, cond.x0), cond.variance, (x0 - uncond.x0) * on)

        return predict
