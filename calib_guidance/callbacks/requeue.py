"""SLURM's pre-emption, answered between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

_EVERY = 5  # steps between two looks: the devices have to agree, which makes them wait for each other


class RequeueBetweenSteps(L.Callback):
    """Under SLURM, lets the answer to SIGUSR1 wait until a training step is done.

    Lightning writes its checkpoint the moment that the signal comes, on each device on its own. In the middle of a step the batch
    at hand would count as seen without having been learned from, and devices could be at different steps. Here the signal is
    only noted, and within five steps all devices write the checkpoint together; then Lightning queues the job again, as it
    does. A signal during validation waits for its end. ``calib-guidance fit`` always has it.
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
