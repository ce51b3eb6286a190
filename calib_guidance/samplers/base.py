"""What every sampler is, and what observers of one are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guidance, Guide, GuidedPrediction


class StepRecord(NamedTuple):
    """One step, as observers see it. Tensors stay on the device; an observer that reads them on the host slows sampling.

    Attributes:
        i: level of :meth:`Sampler.levels`, N − 1 … 0.
        num_steps: N.
        t: step of the full process; between two of them where the sampler goes there.
        y: ``(N,)`` classes.
        x_t: ``(N, C, H, W)`` before the step.
        guided: prediction, gradient and logits.
        x_next: ``(N, C, H, W)`` after the step.
    """

    i: int
    num_steps: int
    t: float
    y: Tensor
    x_t: Tensor
    guided: GuidedPrediction
    x_next: Tensor


Observer = Callable[[StepRecord], None]


class BufferedObserver(ABC):
    """An observer that learns only when a batch is done which of its samples are kept, and counts those."""

    @abstractmethod
    def __call__(self, record: StepRecord) -> None:
        """Note one step."""

    @abstractmethod
    def count(self, rows: slice | Tensor) -> None:
        """Count the samples at ``rows`` of what was noted since the last call; forget the others."""


class Sampler(ABC):
    """``sampler(denoiser, noise, y, guidance, observers) -> images``."""

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Noise,
        y: Tensor,
        guidance: Guidance | None = None,
        observers: Sequence[Observer] = (),
    ) -> Tensor:
        """Sample one batch.

        Args:
            denoiser: the diffusion model.
            noise: source of standard normal images; called once for x_T, then once per noise that a step adds.
            y: ``(N,)`` classes.
            guidance: None samples the model as it is.
            observers: each is called after every step, and after every repetition of one.

        Returns:
            ``(N, C, H, W)`` float32 images.
        """

    @abstractmethod
    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        """Noise levels of the N steps, least noisy first."""

    @abstractmethod
    def num_evaluations(self, denoiser: Denoiser) -> int:
        """Network evaluations per sample."""

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:  # noqa: B027, most have nothing to check
        """Raise ValueError where sampler, denoiser and guidance cannot go together."""


def refuse_sample_shift(sampler: str, guidance: Guidance | None) -> None:
    """Raise ValueError where guidance is to move the sample itself, which is defined for Heun steps."""
    for part in guidance.parts() if guidance else ():
        if part.apply_to == "sample":
            raise ValueError(
                f"apply_to: sample is arXiv 2310.11311's Algorithm 2, a step of the Heun sampler, and {sampler} has none: set "
                "the guidance's apply_to to score, or the sampler to calib_guidance.samplers.Heun"
            )


def refuse_sine(sampler: str, guidance: Guidance | None) -> None:
    """Raise ValueError where the score is to be amplified by the variance of a step that has none."""
    for part in guidance.parts() if guidance else ():
        if part.apply_to == "score" and part.schedule.gamma:
            raise ValueError(
                f"the sine factor is defined through the variance of a DDPM step, and {sampler} has none: set the guidance "
                "schedule's gamma to 0 (--model.init_args.guidance.init_args.schedule.init_args.gamma 0), or sample with DDPM"
            )


def start(
    denoiser: Denoiser, guidance: Guidance | None, levels: NoiseLevels, y: Tensor, clip: bool
) -> tuple[Predict, Guide]:
    """Denoiser and guidance bound to one trajectory, x̂0 clipped to [-1, 1] where asked and where it is an image."""
    raw = denoiser.trajectory(levels, y)
    guide = guidance and guidance.trajectory(levels, y, denoiser.decode)

    def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
        prediction = raw(x_t, i)
        if not (clip and denoiser.clip):
            return prediction
        # A network that overflows must not pass for one that says ±1: 0·∞ is not a number.
        return prediction._replace(x0=prediction.x0.clamp(-1, 1).add(prediction.x0, alpha=0))

    def unguided(predict: Predict, x_t: Tensor, i: int, gradient_only: bool = False) -> GuidedPrediction:
        return GuidedPrediction(None if gradient_only else predict(x_t, i))

    return predict, guide or unguided


def on_device(table: object, like: Tensor) -> Tensor:
    """A float64 table as float32 on the device of ``like``: uploaded once, before the loop."""
    return torch.as_tensor(table).float().to(like.device)
