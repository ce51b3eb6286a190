"""The same denoiser without label (Ho & Salimans 2022, arXiv 2207.12598)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import Negative, PredictPair, doubled
from calib_guidance.diffusion.schedules import NoiseLevels


class Unconditional(Negative):
    """The denoiser without label, of a model trained with label dropout. Both predictions come from one doubled batch."""

    needs_labels = True

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return doubled(denoiser.prepare(levels, torch.cat([y, torch.full_like(y, -1)])))
