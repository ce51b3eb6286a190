"""The same denoiser without label (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.negatives.base import Negative, PredictPair
from calib_guidance.diffusion.schedules import NoiseLevels


class Unconditional(Negative):
    """The denoiser without label, of a model trained with label dropout. Both predictions come from one doubled batch."""

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.num_classes is None:
            raise ValueError("classifier-free guidance needs a class-conditional denoiser (class_conditional: true)")

    def nfe(self, denoiser: Denoiser) -> int:
        return 2 * denoiser.nfe

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        both = denoiser.prepare(levels, torch.cat([y, torch.full_like(y, -1)]))

        def predict_pair(x_t: Tensor, i: int | Tensor) -> tuple[Prediction, Prediction]:
            prediction = both(torch.cat([x_t, x_t]), torch.cat([i, i]) if isinstance(i, Tensor) else i)
            halves = ((None, None) if value is None else value.chunk(2) for value in prediction)
            return tuple(Prediction(*half) for half in zip(*halves, strict=True))

        return predict_pair
