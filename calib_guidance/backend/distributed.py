"""The processes that a measurement is shared out to, one or those that torchrun starts, and the threads of each."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from calib_guidance.errors import ConfigurationError, RunError

_PATIENCE = timedelta(hours=2)  # a process whose images are slower to read may keep the others waiting


class Threads(NamedTuple):
    """A number of threads, and why that many."""

    count: int
    reason: str


def available_cores(quota_file: str | os.PathLike[str] = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may keep busy: those it is bound to, or what its container is given of them if that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(quota_file).read_text().split()
        return max(1, min(bound, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return bound


def physical_cores() -> int:
    """Cores that this process may keep busy, where hyper-threads of one core count once."""
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in bound:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:  # not told
            cores.add(str(number))
    return min(len(cores), available_cores())


def sensible_threads(processes: int, cores: int, environment: Mapping[str, str]) -> Threads | None:
    """Threads for each of so many processes on this machine; None where OMP_NUM_THREADS says it.

    torchrun sets OMP_NUM_THREADS to 1 where it is not set. Under torchrun a 1 is therefore ignored.
    """
    stated = environment.get("OMP_NUM_THREADS")
    if stated and not (stated == "1" and "TORCHELASTIC_RUN_ID" in environment):
        return None
    if "SLURM_PROCID" in environment and "SLURM_CPUS_PER_TASK" in environment:
        count = int(environment["SLURM_CPUS_PER_TASK"])
        return Threads(count, f"{count} cores for each task of SLURM's")
    return Threads(max(1, cores // processes), f"{cores} cores, {processes} process{'es' if processes > 1 else ''}")


def set_threads(processes: int) -> Threads:
    """Let PyTorch compute with as many threads as are sensible for each of ``processes`` on this machine."""
    chosen = sensible_threads(processes, available_cores(), os.environ)
    if chosen is None:
        with contextlib.suppress(ValueError):  # a list for nested regions: OpenMP has taken its first
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return Threads(torch.get_num_threads(), "OMP_NUM_THREADS")
    torch.set_num_threads(chosen.count)
    return chosen


@contextlib.contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"process {distributed.get_rank()} cannot reach the others: one of them has ended, whose message says why ({error})"
        ) from error


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that work together.

    Every process has to call :meth:`sum`, :meth:`gather` and :meth:`gather_rows` in the same order, and gets the same result,
    or a RunError where another process has ended.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a tensor that has one shape on all; on this process's device where there are several."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        with _others_alive():
            distributed.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; anything that pickles."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            with _others_alive():
                distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows ``(Σ n, …)`` of ``(n, …)`` of every process, rank after rank, on the CPU."""
        parts = self.gather(tensor.cpu())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _device(name: str | None, local_rank: int, together: int) -> torch.device:
    default = "cuda" if torch.cuda.device_count() >= together else "cpu"
    try:
        device = torch.device(name or default)
    except RuntimeError as error:
        raise ConfigurationError(f"--device: invalid device {name!r}; expected cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r} (metrics need float64)")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ConfigurationError(
                f"--device: there is no {device} on this machine, which has {torch.cuda.device_count()} GPUs: start as many "
                "processes as there are, or take --device cpu"
            )
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def distributed_context(device: str | None = None) -> Iterator[DistributedContext]:
    """The processes that ``torchrun`` started, connected while inside; without it this one alone.

    ``device`` is ``cpu``, ``cuda`` (each process its own) or ``cuda:NUMBER``; None takes a GPU for each process where the machine
    has as many, and the CPU otherwise. GPUs speak through NCCL, CPUs through gloo.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield DistributedContext(device=_device(device, 0, 1))
        return
    if missing := {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise ConfigurationError(
            f"WORLD_SIZE is {world_size}, and {', '.join(sorted(missing))} are not set: start with torchrun "
            "--nproc-per-node NUMBER -m calib_guidance …, or unset WORLD_SIZE"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    found = _device(device, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    distributed.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield DistributedContext(rank, world_size, found)
    finally:
        distributed.destroy_process_group()
