"""Classifiers at a lower resolution than the images that they guide."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.classifiers.base import Classifier
from calib_guidance.errors import check_numbers
from calib_guidance.scores.base import Score


@final
class ClassifierResolution:
    """Lower resolution of the classifier's input.

    Each pixel is the mean of a block where the sides divide, else antialiased bilinear interpolation. The gradient is carried
    back to the full image: of a block of f × f pixels each gets 1/f² of it. So a change that is the same within blocks changes
    the score by as much as the classifier says, and finer changes by nothing.

    Args:
        side: height of what the classifier sees, in pixels; images that are not larger stay as they are.
        gain: factor on the gradient, for classifiers that are less sensitive at this size. See :func:`fit_gain`.

    Examples:
        >>> ClassifierResolution(side=1)(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]))
        tensor([[[[4.]]]])
    """

    def __init__(self, side: int, gain: float = 1.0):
        check_numbers(least=1, side=side)
        check_numbers(above=0, gain=gain)
        self.side, self.gain = side, gain

    def __call__(self, image: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` at this resolution."""
        height, width = image.shape[-2:]
        if height <= self.side:
            return image
        if height % self.side == 0 and width % (factor := height // self.side) == 0:
            return F.avg_pool2d(image, factor)
        size = self.side, max(1, round(self.side * width / height))
        return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)


def fit_gain(
    classifier: Classifier, score: Score, images: Tensor, y: Tensor, side: int, t: Tensor | None = None
) -> tuple[float, float]:
    """The ``gain`` of :class:`ClassifierResolution` that fits gradients at full resolution best, and the cosine between both.

    Least squares over all pixels of images ``(N, C, H, W)`` of classes ``y`` ``(N,)``: ⟨g, r⟩/⟨r, r⟩ with r the gradient at
    ``side``, g that of the classifier on the full image. Take x̂0 of a sampling run for ``images``.
    """

    def gradient(image_of: ClassifierResolution | None) -> Tensor:
        source = images.detach().requires_grad_()
        logits = classifier(source if image_of is None else image_of(source), t)
        return torch.autograd.grad(score(logits, y).sum(), source)[0].double()

    with torch.enable_grad():
        full, reduced = gradient(None), gradient(ClassifierResolution(side))
    product, square = (full * reduced).sum(), reduced.square().sum()
    return float(product / square), float(product / (square * full.square().sum()).sqrt())
