"""What samplers know of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from calib_guidance.denoisers.base import Predict, Prediction


class GuidedPrediction(NamedTuple):
    """A denoiser's prediction with the guidance for it.

    Attributes:
        prediction: of the denoiser.
        gradient: ``(N, C, H, W)`` s·∇S, to be weighted by the sampler; None where guidance is off.
        noise_shift: ``(N, C, H, W)`` what to take from the noise prediction as it is; None where there is none.
        sine: γ·sin(π·i/N) of this step.
        logits: ``(N, K)`` of the classifier; None where it did not run.
        step_gradient: ``(N, C, H, W)`` ∇S itself, for observers.
    """

    prediction: Prediction
    gradient: Tensor | None = None
    noise_shift: Tensor | None = None
    sine: float = 0.0
    logits: Tensor | None = None
    step_gradient: Tensor | None = None


Guide = Callable[[Predict, Tensor, int], GuidedPrediction]


class Guidance(nn.Module, ABC):
    """Steers a sampler."""

    group_size: int = 1

    @abstractmethod
    def trajectory(self, timesteps: Sequence[int], num_train_steps: int, y: Tensor) -> Guide | None:
        """The guidance along one trajectory.

        Args:
            timesteps: step of the full process at each spaced step, ascending.
            num_train_steps: length of the full process.
            y: ``(N,)`` classes.

        Returns:
            ``guide(predict, x_t, i)``, or None where there is nothing to do at any step.
        """

    @abstractmethod
    def parts(self) -> Sequence[Guidance]:
        """The single guidances that this one is made of, for checks."""
