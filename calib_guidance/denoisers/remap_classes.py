"""A denoiser under other class numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, DenoiserWrapper, Predict
from calib_guidance.diffusion.schedules import NoiseLevels


class RemapClasses(DenoiserWrapper):
    """Renumbered classes of a denoiser: label k asks for its class ``classes[k]``; -1 stays unconditional.

    For subsets of its classes, and for text prompts that each have a class of their own. Classifier-free guidance goes around
    it, not inside.

    Args:
        denoiser: class-conditional.
        classes: the denoiser's class of each label; one may stand for several labels.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> second = RemapClasses(model, classes=[1])
        >>> round(float(second(torch.zeros(1, 1, 1, 1), 999, torch.tensor([0])).x0), 1)
        2.0
    """

    classes: Tensor

    def __init__(self, denoiser: Denoiser, classes: Sequence[int]):
        super().__init__(denoiser)
        if denoiser.num_classes is None:
            raise ValueError("RemapClasses needs a class-conditional denoiser, got one without classes")
        wrong = [k for k in classes if not 0 <= k < denoiser.num_classes]
        if wrong or not classes:
            raise ValueError(f"classes must be one or more of 0 … {denoiser.num_classes - 1}, got {wrong or 'none'}")
        self.num_classes = len(classes)
        self.register_buffer("classes", torch.tensor(list(classes)), persistent=False)

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is not None:
            y = torch.where(y < 0, y, self.classes.to(y.device)[y.clamp(min=0)])
        return self.denoiser.prepare(levels, y)
