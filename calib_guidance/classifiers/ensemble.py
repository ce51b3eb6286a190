"""Several classifiers as one."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from calib_guidance.classifiers.base import Classifier
from calib_guidance.scores.base import as_float


class Ensemble(Classifier):
    """Ensemble of classifiers: the mean of their log-probabilities.

    Their softmax is the geometric mean of the members' probabilities, renormalized.

    Args:
        classifiers: two or more, of the same classes; frozen with the ensemble.

    Examples:
        >>> from calib_guidance.classifiers import OffTheShelfClassifier
        >>> one = OffTheShelfClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> images = torch.ones(1, 1, 2, 2)
        >>> torch.allclose(Ensemble([one, one])(images).softmax(1), one(images).softmax(1))
        True
    """

    def __init__(self, classifiers: Sequence[Classifier]):
        super().__init__()
        if len(classifiers) < 2:
            raise ValueError(f"an ensemble needs at least two classifiers, got {len(classifiers)}")
        counts = [classifier.num_classes for classifier in classifiers]
        if len(set(counts)) > 1:
            raise ValueError(f"the classifiers of an ensemble must have the same classes; theirs number {counts}")
        self.classifiers, self.num_classes = nn.ModuleList(classifiers), counts[0]

    def freeze(self) -> Self:
        for classifier in self.classifiers:
            classifier.freeze()
        return super().freeze()

    def check_image(self, shape: Sequence[int]) -> None:
        for classifier in self.classifiers:
            classifier.check_image(shape)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        log_p = [as_float(classifier(x, t)).log_softmax(dim=1) for classifier in self.classifiers]
        return torch.stack(log_p).mean(0)
