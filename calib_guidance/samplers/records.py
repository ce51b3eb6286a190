"""What a sampler tells those who watch it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from calib_guidance.guidance.base import Guided


class StepRecord(NamedTuple):
    """One step, as observers see it. Tensors stay on the device; an observer that reads them on the host slows sampling.

    Attributes:
        i: level of :meth:`~calib_guidance.samplers.base.Sampler.levels`, N − 1 … 0.
        num_steps: N.
        t: step of the full process; a fraction where the sampler stops between two of them.
        y: ``(N,)`` classes.
        x_t: ``(N, C, H, W)`` before the step.
        guided: prediction, score, logits and gradient.
        x_next: ``(N, C, H, W)`` after the step.
    """

    i: int
    num_steps: int
    t: float
    y: Tensor
    x_t: Tensor
    guided: Guided
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
