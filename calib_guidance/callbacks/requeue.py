"""SLURM preemption, handled between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

_EVERY = 5  # steps: the devices must agree, so they wait for each other


class RequeueBetweenSteps(L.Callback):
    """Under SLURM, handles SIGUSR1 after a training step.

    Lightning writes its checkpoint at the moment of the signal, on each device. In the middle of a step the current batch would
    count as seen without having been learned from, and devices could be at different steps. Here the signal is only noted, and
    within five steps all devices write the checkpoint together; then Lightning requeues the job. A signal during validation
    waits for its end. ``calib-guidance fit`` always has this callback.
    """

    def __init__(self) -> None:
        self.noted = False
        self.answer: Callable[[int, FrameType | None], Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        handler = signal.getsignal(signal.SIGUSR1)
        if SLURMEnvironment.detect() and callable(handler):  # Lightning's, where automatic requeueing is on
            self.answer = handler
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.answer is None or ((batch_idx + 1) % _EVERY and not trainer.is_last_batch):
            return
        if trainer.strategy.reduce_boolean_decision(self.noted, all=False):
            self.noted = False
            self.answer(signal.SIGUSR1, None)
