"""The processes that a measurement is shared out to: one, or those that torchrun starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from calib_guidance.errors import ConfigurationError, RunError

_PATIENCE = timedelta(hours=2)  # a process whose images are slower to read may keep the others waiting


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

    Every process has to call :meth:`sum`, :meth:`gather` and :meth:`gather_rows` in the same order, and gets the same result.
    Each raises RunError where another process has ended.
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
        """The value of every process, by rank; anything small that pickles."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            with _others_alive():
                distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows ``(Σ n, …)`` of ``(n, …)`` of every process, rank after rank, on the CPU."""
        if self.world_size == 1:
            return tensor.cpu()
        counts = self.gather(len(tensor))
        padded = torch.zeros(max(counts), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        with _others_alive():
            distributed.all_gather(parts, padded)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])


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
