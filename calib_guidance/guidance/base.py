"""What samplers know of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from calib_guidance.denoisers.base import Predict, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels


class GuidedPrediction(NamedTuple):
    """A denoiser's prediction with the guidance for it. At most one of the three guiding tensors is there.

    Attributes:
        prediction: of the denoiser; None where only the gradient was asked for and did not need it.
        gradient: ``(N, C, H, W)`` s·∇S, to be weighted by the sampler; None where guidance is off.
        at_x0: whether it was taken at x̂0 and is no gradient with respect to x_t.
        noise_shift: ``(N, C, H, W)`` what to take from the noise prediction as it is; None where there is none.
        direction: ``(N, C, H, W)`` ∇S over its root mean square, to be added to the sample by the sampler.
        scale: s, for ``direction``.
        sine: γ·sin(π·progress) of this step.
        logits: ``(N, K)`` of the classifier; None where it did not run.
        step_gradient: ``(N, C, H, W)`` ∇S itself, for observers.
    """

    prediction: Prediction | None
    gradient: Tensor | None = None
    noise_shift: Tensor | None = None
    direction: Tensor | None = None
    scale: float = 0.0
    sine: float = 0.0
    logits: Tensor | None = None
    step_gradient: Tensor | None = None
    at_x0: bool = False


class Guide(Protocol):
    """Guidance bound to one trajectory."""

    def __call__(self, predict: Predict, x_t: Tensor, i: int, gradient_only: bool = False) -> GuidedPrediction:
        """Prediction and guidance at level ``i``.

        Args:
            predict: the denoiser on the same trajectory.
            x_t: ``(N, C, H, W)``.
            i: level.
            gradient_only: leave the denoiser out where the classifier does not look at its prediction.
        """
        ...


Decode = Callable[[Tensor], Tensor]


def identity(x0: Tensor) -> Tensor:
    """Images of a model of images."""
    return x0


class Guidance(nn.Module, ABC):
    """Steers a sampler."""

    group_size: int = 1

    @abstractmethod
    def trajectory(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide | None:
        """The guidance along one trajectory.

        Args:
            levels: noise levels of the steps.
            y: ``(N,)`` classes.
            decode: images of the denoiser's x̂0.

        Returns:
            A guide, or None where there is nothing to do at any step.
        """

    @abstractmethod
    def active(self, levels: NoiseLevels) -> list[bool]:
        """Whether a classifier is run at each of the levels."""

    @abstractmethod
    def parts(self) -> Sequence[Guidance]:
        """The single guidances that this one is made of, for checks."""
