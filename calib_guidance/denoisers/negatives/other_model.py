"""Another model as the negative: an unconditional one, or a weaker one (autoguidance)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import Negative, PredictAlone, PredictPair
from calib_guidance.diffusion.schedules import NoiseLevels


class UnconditionalModel(Negative):
    """A second model, given no label.

    Args:
        denoiser: the second model, of the same image shape.

    Examples:
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> model, unconditional = (
        ...     GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=labels)
        ...     for labels in (True, False)
        ... )
        >>> combined = Combination(model, negative=UnconditionalModel(unconditional))  # x̂0 = 0 + 1.5·(2 − 0) of pure noise
        >>> round(float(combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0), 1), combined.nfe
        (3.0, 2)
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def check(self, denoiser: Denoiser) -> None:
        if self.denoiser.image_shape != denoiser.image_shape:
            shapes = f"the negative samples {self.denoiser.image_shape}, the denoiser {denoiser.image_shape}"
            raise ValueError(f"{shapes}: name a negative of the same image shape")

    def nfe(self, denoiser: Denoiser) -> int:
        return denoiser.nfe + self.denoiser.nfe

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        cond, negative = denoiser.prepare(levels, y), self.denoiser.prepare(levels, self.labels(y))
        return lambda x_t, i: (cond(x_t, i), negative(x_t, i))

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        predict = self.denoiser.prepare(levels, self.labels(y))
        return lambda x_t, i, cond: predict(x_t, i)

    def labels(self, y: Tensor) -> Tensor:
        """Labels that the second model is given, ``(N,)``."""
        return torch.full_like(y, -1)


class Autoguidance(UnconditionalModel):
    """A weaker model, smaller or less trained, given the same label (Karras et al. 2024, arXiv 2406.02507).

    Args:
        denoiser: the weaker model, of the same image shape and classes.

    Examples:
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> model, weak = (
        ...     GaussianMixture(means=[[-mean], [mean]], covariances=[0.01, 0.01], class_conditional=True)
        ...     for mean in (2.0, 1.0)
        ... )
        >>> combined = Combination(model, negative=Autoguidance(weak))  # x̂0 = 1 + 1.5·(2 − 1) of pure noise
        >>> round(float(combined(torch.zeros(1, 1, 1, 1), 999, torch.tensor([1])).x0), 1)
        2.5
    """

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if (own := self.denoiser.num_classes) != (others := denoiser.num_classes):
            raise ValueError(
                f"the negative has {own} classes, the denoiser {others}: take UnconditionalModel, which gives no label"
            )

    def labels(self, y: Tensor) -> Tensor:
        return y
