"""How many threads a process computes with."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch


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


def sensible_threads(processes: int, cores: int, environment: Mapping[str, str]) -> Threads | None:
    """Threads for each of so many processes on this machine; None where OMP_NUM_THREADS says it.

    torchrun sets OMP_NUM_THREADS to 1 where nobody has set it, so that under torchrun a 1 is nobody's wish.
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
        return Threads(torch.get_num_threads(), "OMP_NUM_THREADS")
    torch.set_num_threads(chosen.count)
    return chosen
