"""Independent condition guidance, ICG (Sadat et al. 2024, arXiv 2407.02687)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict
from calib_guidance.denoisers.negatives.base import RandomNegative
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels


class IndependentCondition(RandomNegative):
    """Independent condition guidance: the denoiser with a random label at every level, for models without label dropout.

    Labels are uniform, the sample's own among them, as leaving it out would bias the estimate. They follow from the sample's x_T.
    Samples without label (-1) keep none. Both predictions come from one doubled batch.

    Examples:
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> combined = Combination(model, negative=IndependentCondition())  # its label is 0 or 1 by chance
        >>> round(float(combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0), 1) in (2.0, 4.0)
        True
    """

    needs_labels = True

    def predictors(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor, x: Tensor, both: bool) -> list[Predict]:
        labels = (KeyedNumbers(x).uniform(len(levels.times)) * (denoiser.num_classes or 0)).long()
        labels = torch.where(y[:, None] < 0, -1, labels)
        rows = [torch.cat([y, own]) if both else own for own in labels.T]
        parts = [denoiser.prepare(levels.select([k]), row) for k, row in enumerate(rows)]
        return [lambda x_t, i, predict=predict: predict(x_t, 0) for predict in parts]
