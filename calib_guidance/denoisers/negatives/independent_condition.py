"""Independent condition guidance, ICG (Sadat et al. 2024, arXiv 2407.02687)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import PredictPair, RandomNegative, doubled
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels


class IndependentCondition(RandomNegative):
    """The denoiser with a random label, drawn again at every level: for models trained without label dropout.

    Labels are uniform, the sample's own among them, as leaving it out would bias the estimate. They follow from the sample's x_T.
    Samples without label (-1) keep none. Both predictions come from one doubled batch.
    """

    needs_labels = True

    def pairs(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor) -> list[PredictPair]:
        labels = (KeyedNumbers(x).uniform(len(levels.times)) * (denoiser.num_classes or 0)).long()
        labels = torch.where(y[:, None] < 0, -1, labels)
        pairs = [doubled(denoiser.prepare(levels.select([k]), torch.cat([y, own]))) for k, own in enumerate(labels.T)]
        return [lambda x_t, i, pair=pair: pair(x_t, 0) for pair in pairs]
