"""The same denoiser without label (Ho & Salimans 2022, arXiv 2207.12598)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import Negative, PredictAlone, PredictPair, doubled
from calib_guidance.diffusion.schedules import NoiseLevels


class Unconditional(Negative):
    """The denoiser without label, of a model trained with label dropout. Both predictions come from one doubled batch.

    Examples:
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> combined = Combination(model, negative=Unconditional())  # x̂0 = 0 + 1.5·(2 − 0) of pure noise
        >>> round(float(combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0), 1)
        3.0
    """

    needs_labels = True

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return doubled(denoiser.prepare(levels, torch.cat([y, torch.full_like(y, -1)])))

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        predict = denoiser.prepare(levels, torch.full_like(y, -1))
        return lambda x_t, i, cond: predict(x_t, i)
