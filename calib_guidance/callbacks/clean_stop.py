"""Signals that stop a run."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from calib_guidance.errors import ConfigurationError, StoppedError
from calib_guidance.samplers import StepRecord

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME = 1.0  # seconds within which a repeated signal is the same, sent to a group of processes and forwarded among them


@contextlib.contextmanager
def restored_signals() -> Iterator[None]:
    """Put the handlers of signals back at the end, whatever a run has made of them."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


class StopSignals:
    """Notes the first signal that asks a run to stop; a second one stops at once.

    Replaces Lightning's handlers: its SIGTERM starts a collective inside the handler, its SIGUSR1 under SLURM writes a checkpoint
    in the middle of a step. The command line restores all handlers at its end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that was noted
        # Lightning's for SIGUSR1 under SLURM, None where automatic requeueing is off.
        self.requeue_handler: Callable[[int, FrameType | None], Any] | None = None
        self._noted = 0.0
        self._trainer: L.Trainer | None = None
        self._process = self._parent = 0
        self.forward: Callable[[int], object] = lambda signum: None  # to processes that share the work

    def install(self, trainer: L.Trainer) -> None:
        """Handle the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._trainer, self._process, self._parent = trainer, os.getpid(), os.getppid()
        answer = signal.getsignal(signal.SIGUSR1)
        if answer != self._note:
            self.requeue_handler = answer if SLURMEnvironment.detect() and callable(answer) else None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
                signal.signal(number, self._note)
        if trainer.received_sigterm and self.signal is None:
            self._note(signal.SIGTERM, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads data for this one, and ends with it
        now = time.monotonic()
        if self.signal is not None:
            # Not the signal that a process gets whose parent has answered the first one, and ended.
            if now - self._noted > _SAME and os.getppid() == self._parent:
                raise self.stopped("at once")
            return
        self.signal, self._noted = signal.Signals(signum), now
        if (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(signum)  # processes of Lightning, which a signal to this one does not reach
        self.forward(signum)
        self.noted()

    def noted(self) -> None:
        """Called in the handler of the first signal."""

    def cure(self) -> str:
        """What is kept and how to resume."""
        return f"Complete shards are kept; re-run to resume (calib-guidance status {self._trainer.default_root_dir})"

    def stopped(self, how: str) -> StoppedError:
        """The error that ends the run."""
        error = StoppedError(f"stopped by {self.signal.name}, {how}. {self.cure()}")
        error.by_signal = True
        environment = getattr(self._trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and self._trainer.local_rank > 0:
            error.status = 0  # Lightning kills the processes beside one that it started and that fails
        return error


class CleanStop(StopSignals):
    """Answers signals while sampling within so many seconds, with :class:`~calib_guidance.errors.StoppedError`.

    The current shard is finished if the measured pace allows it, and abandoned otherwise: part of a shard is worth nothing, and
    another worker can start it. The time is checked after every step. As Lightning does, SIGUSR1 under SLURM requeues the job,
    after the claims are released.
    """

    def __init__(self, within: float):
        if not within >= 0:
            raise ConfigurationError(f"stop_within must be a number of seconds of at least 0, got {within}")
        super().__init__()
        self.within = within
        self.behind = 0.0  # seconds from the last sample of a shard until it was written, the last time
        self._told = False
        self._pace: float | None = None  # seconds per sample of the last batch
        self._started = 0.0  # the current batch
        self._left = 0  # samples of the shard from the current batch on; 0 between two shards

    def begin(self, samples: int) -> None:
        """Start a batch, with which so many samples of its shard are left."""
        self._started, self._left = time.monotonic(), samples
        self._look()

    def __call__(self, record: StepRecord) -> None:
        """Observe a step."""
        self._look()

    def end(self, samples: int, finish: Callable[[], None]) -> None:
        """End a batch of so many samples; after the last of a shard, ``finish`` waits until the shard is written."""
        now = time.monotonic()
        self._pace, self._started = (now - self._started) / max(samples, 1), now
        self._left -= samples
        if self._left <= 0 and self.signal is not None:
            finish()
            raise self.stopped("the current shard was finished")
        self._look()

    def requeue(self) -> None:
        """Requeue the SLURM job, if SIGUSR1 announced its end."""
        if not (self.requeue_handler and self.signal == signal.SIGUSR1 and self._trainer.is_global_zero):
            return
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning(f"job {job} could not be requeued: {error}")

    def noted(self) -> None:
        if self._left <= 0:
            raise self.stopped("between two shards")

    def _look(self) -> None:
        if self.signal is None:
            return
        end = self._noted + self.within
        if not self._told:
            log.warning(f"{self.signal.name}: finishing the current shard, or abandoning it within {self.within:g} s")
            self._told = True
        expected = time.monotonic() if self._pace is None else self._started + self._pace * self._left + self.behind
        if max(expected, time.monotonic()) > end:
            raise self.stopped("the current shard was abandoned")
