"""A denoiser under other class numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict
from calib_guidance.diffusion.schedules import NoiseLevels


class RemapClasses(Denoiser):
    """A class-conditional denoiser asked for its class ``classes[k]`` by the label k; -1 stays no class.

    For subsets of its classes, and for text prompts that each have a class of their own. Classifier-free guidance goes around
    it, not inside.

    Args:
        denoiser: class-conditional.
        classes: the denoiser's class of each label; one may stand for several labels.

    Raises:
        ValueError: a denoiser without classes, no classes, or one that it does not have.
    """

    def __init__(self, denoiser: Denoiser, classes: Sequence[int]):
        super().__init__()
        if denoiser.num_classes is None:
            raise ValueError("there are no classes to relabel: the denoiser is not class-conditional")
        wrong = [k for k in classes if not 0 <= k < denoiser.num_classes]
        if wrong or not classes:
            raise ValueError(
                f"classes must be one or more numbers in 0 … {denoiser.num_classes - 1}, the denoiser's; got "
                f"{wrong or 'none'}"
            )
        self.denoiser, self.num_classes = denoiser, len(classes)
        self.schedule, self.image_shape, self.clip = denoiser.schedule, denoiser.image_shape, denoiser.clip
        self.has_learned_variance, self.evaluations = denoiser.has_learned_variance, denoiser.evaluations
        self.register_buffer("classes", torch.tensor(list(classes)), persistent=False)

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)

    def trajectory(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is not None:
            y = torch.where(y < 0, y, self.classes.to(y.device)[y.clamp(min=0)])
        return self.denoiser.trajectory(levels, y)
