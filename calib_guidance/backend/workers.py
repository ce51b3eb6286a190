"""Worker processes: forks of this process that share its work, and continue where it does."""

import logging
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NoReturn

import numpy as np
import torch

from calib_guidance.backend.atomic import end_with_parent
from calib_guidance.errors import RunError, StoppedError

log = logging.getLogger(__name__)
_POLL = 0.1  # seconds
_MOST_BYTES = 30_000  # of a message: it fits into the pipe, and writing it does not block


class WorkerTraceback(Exception):  # noqa: N818 (it is the cause of an error)
    """Traceback of a worker process, the cause of the error that it raised."""


def _encoded(error: BaseException) -> bytes:
    """The error with its traceback, as a message; an error that does not pickle becomes a RunError with its text."""
    text = "".join(traceback.format_exception(error))[-_MOST_BYTES // 2 :]
    message = pickle.dumps((RunError(f"{type(error).__name__}: {str(error)[: _MOST_BYTES // 4]}"), text))
    try:
        full = pickle.dumps((error, text))
        pickle.loads(full)
    except Exception:
        return message
    return full if len(full) <= _MOST_BYTES else message


_jobs: Sequence[Callable[[], Any]] = ()  # of :func:`in_forks`, which its forks inherit


def _do(number: int) -> Any:
    return _jobs[number]()


def in_forks(jobs: Sequence[Callable[[], Any]], count: int) -> list[Any]:
    """Results of jobs, done by ``count`` forks of this process. Jobs need not pickle; results and errors do."""
    global _jobs
    _jobs = jobs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # One thread each: those of this process do not survive the fork.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), torch.set_num_threads, (1,))
        with pool:
            return list(pool.map(_do, range(len(jobs))))


class Workers:
    """The processes that share one run on this machine: this one, and those that :meth:`fork` adds.

    After the fork all of them execute the same code. The first (``number`` 0) shows progress, raises the errors of the others and
    outlives them; each of the others ends in :meth:`leave`. Without a fork there is one.

    Attributes:
        number: of this process, from 0.
        count: of processes that started.
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 1
        self._done = np.zeros(1)  # what each process has done, in memory that all share
        self._pipes: dict[int, int] = {}  # of each worker that runs: process number and the file its error is read from
        self._pipe: int | None = None  # of a worker: what its error is written to

    def fork(self, count: int) -> None:
        """Start ``count`` - 1 workers, or fewer where the system allows no more processes."""
        self._done = np.frombuffer(mmap.mmap(-1, 8 * count))
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        for number in range(1, count):
            reading, writing = os.pipe()
            try:
                with warnings.catch_warnings():
                    # Python warns of forks beside other threads. Those of the libraries wait for work, and hold no lock.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process = os.fork()
            except OSError as error:
                log.warning(f"{number} processes share the work instead of {count}: {error.strerror}")
                os.close(reading)
                os.close(writing)
                break
            if process == 0:
                for other in (reading, *self._pipes.values()):
                    os.close(other)
                self.number, self.count, self._pipe, self._pipes = number, count, writing, {}
                random.seed()  # each looks for work in another order
                end_with_parent(parent=parent)
                return
            os.close(writing)
            self._pipes[process] = reading
            self.count = number + 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that started the others."""
        return self.number == 0

    def share(self, done: float) -> float:
        """Let the others see how much this process has done; returns how much all have."""
        self._done[self.number] = done
        return float(self._done.sum())

    def total(self) -> float:
        """How much all processes have done."""
        return float(self._done.sum())

    def check(self) -> None:
        """Raise the error of a worker that has failed, and log those that a signal has ended. Waits for nothing."""
        for process in list(self._pipes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self._ended(process, os.waitstatus_to_exitcode(status))

    def _ended(self, process: int, status: int) -> None:
        with open(self._pipes.pop(process), "rb") as pipe:
            message = pipe.read()
        if message:
            error, text = pickle.loads(message)
            raise error from WorkerTraceback(f"in worker process {process}:\n{text}")
        if status:
            how = f"was stopped (status {status})" if status > 0 else f"was killed by {signal.Signals(-status).name}"
            hint = ", which the system sends when memory runs out" if -status == signal.SIGKILL else ""
            log.warning(f"worker process {process} {how}{hint}; the others continue with its samples")

    def wait(self, show: Callable[[], object]) -> bool:
        """Wait until one more worker has ended, and call ``show`` meanwhile; False if none is left. Raises its error."""
        if not self._pipes:
            return False
        running = len(self._pipes)
        while len(self._pipes) == running:
            self.check()
            show()
            time.sleep(_POLL)
        return True

    def send(self, signum: int) -> None:
        """Send a signal to all workers."""
        for process in self._pipes:
            os.kill(process, signum)

    def stop(self, within: float, ask: bool = True) -> None:
        """Wait until all workers end, with SIGTERM where ``ask``. SIGKILL ends those that run after ``within`` seconds."""
        try:
            if ask:
                self.send(signal.SIGTERM)
            end = time.monotonic() + within
            while self._pipes and time.monotonic() < end:
                for process in list(self._pipes):
                    if os.waitpid(process, os.WNOHANG)[0]:
                        os.close(self._pipes.pop(process))
                time.sleep(_POLL)
        finally:  # also where a second signal raises
            self.send(signal.SIGKILL)
            for process, pipe in self._pipes.items():
                os.waitpid(process, 0)
                os.close(pipe)
            self._pipes.clear()

    def leave(self, error: BaseException | None = None) -> NoReturn:
        """End this worker. The first process raises ``error``, except for a stop that a signal asked for."""
        stopped = isinstance(error, StoppedError) and error.by_signal
        if error is not None and not stopped:
            os.write(self._pipe, _encoded(error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(StoppedError.status if stopped else int(error is not None))
