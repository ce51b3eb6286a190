"""Signals that stop a ``fit``."""

from __future__ import annotations

import logging
import signal
from typing import Any

import lightning as L

from calib_guidance.callbacks.clean_stop import StopSignals
from calib_guidance.callbacks.exact_resume import last_checkpoint, save_last

log = logging.getLogger(__name__)
_EVERY = 5  # batches on several devices: they must agree, so they wait for each other


class StopBetweenSteps(L.Callback, StopSignals):
    """Answers SIGTERM, SIGINT (Ctrl-C) and SIGHUP with a checkpoint after the current step, and says how to resume.

    SIGUSR1 under SLURM writes Lightning's checkpoint and requeues the job. In the middle of a step, where Lightning writes it,
    the current batch would count as seen without having been learned from, gradients that are being accumulated would be
    lost, and devices could be at different steps. A signal during validation waits for its end. A second signal stops at once.
    ``calib-guidance fit`` always has this callback.
    """

    def __init__(self) -> None:
        StopSignals.__init__(self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        usr1 = signal.getsignal(signal.SIGUSR1)
        self.install(trainer)
        if self.requeue_handler is None:
            signal.signal(signal.SIGUSR1, usr1)

    def noted(self) -> None:
        log.warning(f"{self.signal.name}: stopping after the current step, or after validation; again to stop at once")

    def cure(self) -> str:
        callback = last_checkpoint(self._trainer)
        path = callback and (callback._last_checkpoint_saved or callback.last_model_path)
        return f"To resume, re-run with --ckpt_path {path}" if path else "No checkpoint was written"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulated = trainer.accumulate_grad_batches
        step, rest = divmod(batch_idx + 1, accumulated)
        every = 1 if trainer.world_size == 1 else max(1, _EVERY // accumulated)
        if trainer.is_last_batch or not (rest or step % every):
            self._answer(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._trainer is not None and not trainer.sanity_checking:
            self._answer(trainer)

    def _answer(self, trainer: L.Trainer) -> None:
        """Do on all devices what a signal to any of them asks for."""
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(self.signal is not None, all=False):
            return
        requeue = self.requeue_handler is not None and self.signal in (None, signal.SIGUSR1)
        if agree(requeue, all=True):
            self.signal = None
            self.requeue_handler(signal.SIGUSR1, None)
            return
        callback = last_checkpoint(trainer)
        if callback is not None and (trainer.validating or callback._last_global_step_saved != trainer.global_step):
            save_last(trainer)
        self.signal = self.signal or signal.SIGTERM  # another device's
        raise self.stopped(f"after step {trainer.global_step}")
