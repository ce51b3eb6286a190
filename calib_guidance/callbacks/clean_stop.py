"""What a sampling run does when it is asked to end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from calib_guidance.errors import ConfigurationError, StoppedError
from calib_guidance.samplers import StepRecord

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME = 1.0  # seconds within which a signal that comes again is the same, sent to a group of processes and passed on among them


class CleanStop:
    """Answers SIGTERM, SIGUSR1 and Ctrl-C within a stated time, with :class:`~calib_guidance.errors.StoppedError`.

    The shard at hand is finished where the measured pace says that it can be, and given up otherwise: part of a shard is worth
    nothing, and another worker can begin with it. It is looked at after every step, which is what may come on top of the time.
    A second signal stops at once.

    Lightning's own answers are left out: to SIGTERM it starts a collective inside the handler, to SIGUSR1 under SLURM it writes
    a checkpoint of the model. As it does, SIGUSR1 under SLURM queues the job again, once the claims are given back.

    Args:
        within: seconds, ≥ 0.

    Attributes:
        behind: seconds from the last sample of a shard until it was written, the last time.

    Raises:
        ConfigurationError: a negative time.
    """

    def __init__(self, within: float):
        if not within >= 0:
            raise ConfigurationError(f"stop_within must be a number of seconds of at least 0, got {within}")
        self.within, self.behind = within, 0.0
        self._signal: signal.Signals | None = None
        self._noted = 0.0
        self._told = False
        self._trainer: L.Trainer | None = None
        self._process = 0
        self._requeue = False
        self._pace: float | None = None  # seconds per sample of the last batch
        self._started = 0.0  # the batch at hand
        self._left = 0  # samples of the shard from its beginning on; 0 where no shard is at hand

    def install(self, trainer: L.Trainer) -> None:
        """Take the signals over. Lightning gives them back at the end of the run, whichever it is."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._trainer, self._process = trainer, os.getpid()
        answer = signal.getsignal(signal.SIGUSR1)
        if answer != self._note:
            # Its answer is there only where automatic requeueing is on.
            self._requeue = SLURMEnvironment.detect() and callable(answer)
        for number in SIGNALS:
            signal.signal(number, self._note)
        if trainer.received_sigterm and self._signal is None:
            self._note(signal.SIGTERM, None)

    def begin(self, samples: int) -> None:
        """A batch begins; with it so many samples of its shard are left to make."""
        self._started, self._left = time.monotonic(), samples
        self._look()

    def __call__(self, record: StepRecord) -> None:
        """An observer: a step has been made."""
        self._look()

    def end(self, samples: int, finish: Callable[[], None]) -> None:
        """A batch of so many samples is done; where it was the last of its shard, ``finish`` waits until that is written."""
        now = time.monotonic()
        self._pace, self._started = (now - self._started) / max(samples, 1), now
        self._left -= samples
        if self._left <= 0 and self._signal is not None:
            finish()
            raise self._stop("the shard at hand was finished")
        self._look()

    def requeue(self) -> None:
        """Queue the SLURM job again, where SIGUSR1 said that its time is over."""
        if not (self._requeue and self._signal == signal.SIGUSR1 and self._trainer.is_global_zero):
            return
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning(f"job {job} could not be queued again: {error}")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # one that reads data for this one, and ends with it
        now = time.monotonic()
        if self._signal is not None:
            if now - self._noted > _SAME:
                raise self._stop("at once")
            return
        self._signal, self._noted = signal.Signals(signum), now
        if (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(signum)  # processes that Lightning started, which a signal to this one alone does not reach
        if self._left <= 0:
            raise self._stop("between two shards")

    def _look(self) -> None:
        if self._signal is None:
            return
        end = self._noted + self.within
        if not self._told:
            log.warning(f"{self._signal.name}: finishing the shard at hand, or giving it up within {self.within:g} s")
            self._told = True
        expected = time.monotonic() if self._pace is None else self._started + self._pace * self._left + self.behind
        if max(expected, time.monotonic()) > end:
            raise self._stop("the shard at hand was given up")

    def _stop(self, how: str) -> StoppedError:
        folder = Path(self._trainer.default_root_dir)
        error = StoppedError(
            f"stopped by {self._signal.name}, {how}. What is written stays, and the same command does the rest "
            f"(calib-guidance status {folder})"
        )
        environment = getattr(self._trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and self._trainer.local_rank > 0:
            error.status = 0  # Lightning kills the processes beside one that it started and that fails
        return error
