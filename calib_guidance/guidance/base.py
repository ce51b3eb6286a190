"""What samplers know of guidance."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.schedules import GuidanceSchedule


class Aux(NamedTuple):
    """Side outputs of guidance for observers; None where the classifier did not run.

    Examples:
        >>> Aux(logits=torch.tensor([[2.0, 0.0]])).logits.argmax(1), Aux().gradient  # no classifier ran in the second
        (tensor([0]), None)
    """

    logits: Tensor | None = None  # (N, K)
    gradient: Tensor | None = None  # (N, C, H, W) ∇S, without scale
    fresh: Tensor | None = None  # (N,) bool, the samples whose gradient is new here; None where all are


class Guided(NamedTuple):
    """Guided prediction. Guidance that shifts x̂0 is part of it; other guidance is beside it.

    There is no prediction where guidance is applied to the sample (arXiv 2310.11311, Algorithm 2), whose sampler predicts
    after it has moved the sample.

    Examples:
        >>> unguided = Guided(Prediction(torch.ones(1, 1, 1, 1)))
        >>> unguided.predicted().x0.item(), unguided.score
        (1.0, None)
    """

    prediction: Prediction | None
    score: Tensor | None = None  # (N, C, H, W) s·∇S in units of ∇log p
    aux: Aux = Aux()  # for observers
    move: Tensor | None = None  # (N, C, H, W) what the loop adds to x' = √ᾱ'·x0 + √(1−ᾱ')·ε of the step

    def predicted(self) -> Prediction:
        """The prediction, where guidance is not applied to the sample."""
        assert self.prediction is not None
        return self.prediction


class Plan(NamedTuple):
    """What guidance does at each noise level, known before sampling; ``(T,)`` each.

    Examples:
        >>> from calib_guidance.classifiers import GaussianMixtureClassifier
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01])
        >>> guide = ClassifierGuidance(GaussianMixtureClassifier(model), scale=2.0, schedule=GuidanceSchedule(every=2))
        >>> guide.plan(model.schedule.respace(3).levels).active.tolist()  # index 0 is the last step
        [True, False, True]
    """

    active: np.ndarray  # bool, whether guidance is on
    scale: np.ndarray  # s
    sine: np.ndarray  # γ·sin(π·progress)
    at_x0: np.ndarray  # bool, whether the score is a gradient taken at x̂0, not one with respect to x_t
    moves_sample: bool = False  # whether guidance is applied to the sample
    runs: np.ndarray | None = None  # bool, where a classifier may run; None where guidance is on


Guide = Callable[[Predict, Tensor, int], Guided]
Decode = Callable[[Tensor], Tensor]


def identity(x0: Tensor) -> Tensor:
    """Images of a model of images."""
    return x0


class Guidance(nn.Module, ABC):
    """Base class of guidance.

    ``guidance(denoiser, x_t, t, y)`` is one guided prediction. A sampler calls :meth:`prepare` once instead, and its result at
    every step.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> class Shift(Guidance):  # guidance of your own: adds 1 to x̂0
        ...     def plan(self, levels):
        ...         ones = np.ones(len(levels.times))
        ...         return Plan(active=ones > 0, scale=ones, sine=0 * ones, at_x0=ones > 0)
        ...     def prepare(self, levels, y, decode=identity):
        ...         return lambda predict, x_t, i: Guided(predict(x_t, i).shifted(torch.ones_like(x_t)))
        >>> model = GaussianMixture(means=[[2.0]], covariances=[0.01])
        >>> guided = Shift()(model, torch.zeros(1, 1, 1, 1), 999, torch.tensor([0]))
        >>> round(float(guided.predicted().x0), 2)
        3.0
    """

    apply_to: str  # of parts: what the gradient is added to
    schedule: GuidanceSchedule  # of parts with a sine factor
    group_size: int = 1  # number of consecutive samples that guidance looks at together

    @abstractmethod
    def prepare(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide:
        """Bind guidance to noise levels and classes ``y`` ``(N,)``; ``decode`` makes images of the denoiser's x̂0.

        Returns:
            ``guide(predict, x_t, i)``, the guided prediction for ``x_t`` ``(N, C, H, W)`` at level ``i``, where ``predict`` is
            the denoiser bound to the same levels.
        """

    @abstractmethod
    def plan(self, levels: NoiseLevels) -> Plan:
        """What is known before a trajectory through these levels starts."""

    def seen(self, image: Tensor) -> Tensor:
        """What the classifier sees of images ``(N, C, H, W)``."""
        return image

    def parts(self) -> Sequence["Guidance"]:
        """The single guidances that this one is made of, for checks."""
        return [self]

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: int, y: Tensor) -> Guided:
        """One guided prediction for ``x_t`` ``(N, C, H, W)`` at step ``t`` of the full process, of classes ``y`` ``(N,)``."""
        levels = denoiser.schedule.at([int(t)])
        return self.prepare(levels, y, denoiser.decode)(denoiser.prepare(levels, y), x_t, 0)
