"""Work in a thread beside the main one: what a run does with a batch while the device makes the next one."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from calib_guidance.backend.threads import available_cores
from calib_guidance.errors import RunError


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run already. One that starts them on demand may find no memory for them in the middle of a run."""
    pool, all_run = ThreadPoolExecutor(threads, thread_name_prefix="background"), threading.Barrier(threads)
    try:
        wait([pool.submit(all_run.wait) for _ in range(threads)])
    except RuntimeError as error:
        all_run.abort()
        pool.shutdown()
        raise RunError(
            f"no thread could be started ({error}): raise the limit of processes (ulimit -u) or of memory, or end other "
            "processes. Re-run to resume"
        ) from error
    return pool


class Background:
    """Does jobs one after the other in a thread of its own.

    After a job has failed the later ones are skipped, and the main thread gets the error at its next call.

    Args:
        waiting: the most jobs that are given and not done, which bounds the memory that they hold.

    Attributes:
        error: of the first job that failed, None while none did.
        pool: threads that jobs may use, one for each core.
    """

    def __init__(self, waiting: int):
        self.waiting = waiting
        self.error: BaseException | None = None
        self._thread, self.pool = _started(1), _started(available_cores())
        self._jobs: deque[Future[None]] = deque()

    def give(self, job: Callable[[], object]) -> None:
        """Give a job, as soon as there is room for it. Raises the error of an earlier one."""
        while len(self._jobs) >= self.waiting:
            wait([self._jobs.popleft()])
        self.check()
        self._jobs.append(self._thread.submit(self._do, job))

    def _do(self, job: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            job()
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raise the error of a job that failed."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Wait until all jobs are done. Raises the error of a job that failed."""
        wait(self._jobs)
        self._jobs.clear()
        self.check()

    def close(self) -> None:
        """Wait until all jobs are done, and take no more."""
        self._thread.shutdown()
        self.pool.shutdown()


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU beside the one that computes."""
    return torch.cuda.Stream(device)


def to_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start to copy tensors to the host, beside what a GPU computes next.

    Args:
        tensors: not to be changed in place before the copies are complete.

    Returns:
        Function that waits for the copies and returns them; for any thread.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: {name: tensor.cpu() for name, tensor in tensors.items()}
    stream, done = _copies(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        pinned = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
        host = {name: pinned[name].copy_(tensor, non_blocking=True) for name, tensor in tensors.items()}
        done.record(stream)

    def copied() -> dict[str, Tensor]:
        done.synchronize()
        tensors.clear()  # kept until now, so that their memory is not reused
        return host

    return copied
