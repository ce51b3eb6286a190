"""How many processes of this machine sample a run, and how they start."""

import importlib
import os
import sys
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from calib_guidance.backend import tuning
from calib_guidance.backend.compilation import eager
from calib_guidance.backend.counters import PeakMemory, free_memory
from calib_guidance.backend.distributed import physical_cores, set_threads
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.context import SamplingContext
from calib_guidance.tasks.retry import FaultTolerant

_MARGIN = 1.5  # memory inside kernels, and what the allocator keeps, over that of tensors
_EACH = 200e6  # bytes of a process beside its batch and its copies of packed weights
# Set by what starts several processes itself, torchrun and SLURM.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")


class _Number(NamedTuple):
    """A number of processes, and why that many."""

    count: int
    reason: str


def can_fork(trainer: L.Trainer) -> bool:
    """Whether processes that this one forks can do its work."""
    return sys.platform == "linux" and trainer.strategy.root_device.type == "cpu"


def why_single(trainer: L.Trainer, module: FaultTolerant) -> str | None:
    """Why this run cannot be forked; None if it can."""
    if not can_fork(trainer):
        return f"it samples on {trainer.strategy.root_device}, and forks are safe with CPUs on Linux only"
    parts = (part for network in module.networks().values() for part in network.modules())
    obstacles = {
        "the trainer has several devices or nodes": trainer.world_size > 1,
        "trainer.limit_predict_batches counts batches of each process": trainer.limit_predict_batches != 1.0,
        "a network is compiled, which each process would do": any(
            getattr(part, "is_compiled", False) for part in parts
        ),
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def batch_bytes(module: FaultTolerant, requests: L.LightningDataModule) -> float:
    """Bytes that a process needs to sample batches: from one evaluation of the smallest batch, and the sizes of the weights."""
    with PeakMemory() as memory, eager(), tuning.plain(), torch.no_grad():
        module.evaluate_once()
    weights = sum(tensor.nbytes for network in module.networks().values() for tensor in network.state_dict().values())
    return _MARGIN * memory.peak * requests.batch_size / module.group_size + weights + _EACH


def choose(trainer: L.Trainer, module: FaultTolerant, context: SamplingContext) -> _Number:
    """How many processes sample the shards that are left. ConfigurationError if as many as were asked for cannot."""
    asked, obstacle = context.num_processes, why_single(trainer, module)
    if asked is not None and asked > 1 and obstacle:
        raise ConfigurationError(
            f"--workers {asked}: only one process can sample here, as {obstacle}: set it to 1 or auto"
        )
    launcher = next((name for name in _LAUNCHERS if name in os.environ), None)
    if asked is None and (obstacle or launcher):
        return _Number(1, obstacle or f"{launcher} is set")
    if asked is None and os.environ.get("OMP_NUM_THREADS"):
        return _Number(1, "OMP_NUM_THREADS is set; --workers NUMBER starts more")
    cores, shards = physical_cores(), len(context.shards)
    count, reason = min(asked or cores, shards), f"{cores} physical core{'s' if cores > 1 else ''}"
    if shards < (asked or cores):
        reason = f"{shards} shard{'s' if shards > 1 else ''} left"
    if count < 2:
        return _Number(1, reason)
    each, free = batch_bytes(module, trainer.datamodule), free_memory(torch.device("cpu"))
    fit = max(1, int(free / each))
    if fit >= count:
        return _Number(count, reason)
    needed = f"each process needs about {each / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if asked is not None:
        raise ConfigurationError(f"--workers {asked}: {needed}: set it to {fit} or less, or lower data.batch_size")
    return _Number(fit, needed)


def share_work(trainer: L.Trainer, module: FaultTolerant, context: SamplingContext) -> None:
    """Fork the processes that sample with this one. Each returns, with its threads set; all but the first are silent."""
    found = choose(trainer, module, context)
    if found.count == 1:
        threads = set_threads(trainer.num_devices)
        rank_zero_info(f"one process with {threads.count} CPU threads ({threads.reason}): {found.reason}")
        return
    importlib.import_module("datasets")  # by all of them at their first shard, if not before the fork
    # Pools of several threads do not survive a fork, and the command line lets PyTorch have one until here.
    threads = int(os.environ.get("OMP_NUM_THREADS") or physical_cores() // found.count)
    threads = max(1, threads) if torch.get_num_threads() == 1 else 1
    context.workers.fork(found.count)
    torch.set_num_threads(threads)
    if context.workers.is_first:
        text = f"{context.workers.count} processes with {torch.get_num_threads()} CPU threads each"
        rank_zero_info(f"{text} ({found.reason}); --workers 1 samples in one process")
        return
    rank_zero_only.rank = context.workers.number
    trainer.loggers = []
    if trainer.progress_bar_callback:
        trainer.progress_bar_callback.disable()
