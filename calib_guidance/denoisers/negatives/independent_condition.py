"""Independent condition guidance, ICG (Sadat et al. 2024, arXiv 2407.02687)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import ByLevel, Negative, PredictPair, doubled
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels


class IndependentCondition(Negative):
    """The denoiser with a random label, drawn anew at every level: for models trained without label dropout.

    Labels are uniform, the sample's own among them, as leaving it out would bias the estimate. They follow from the sample's x_T.
    Samples without label (-1) keep none. Both predictions come from one doubled batch.
    """

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.num_classes is None:
            raise ValueError("IndependentCondition needs a class-conditional denoiser (class_conditional: true)")

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return _RandomLabels(denoiser, levels, y)


class _RandomLabels(ByLevel):
    def start(self, x: Tensor) -> None:
        count, num_classes = len(self.levels.times), self.denoiser.num_classes
        labels = (KeyedNumbers(x).uniform(count) * num_classes).long()
        labels = torch.where(self.y[:, None] < 0, -1, labels)
        for k in range(count):
            pair = doubled(self.denoiser.prepare(self.levels.select([k]), torch.cat([self.y, labels[:, k]])))
            self._pairs.append(lambda x_t, i, pair=pair: pair(x_t, 0))
