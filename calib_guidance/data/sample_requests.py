"""What to sample: index, class and seed of every sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from calib_guidance.diffusion.rng import random_label
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.context import SamplingContext, ShardPart
from calib_guidance.runs.store import cut

POLICIES = ("balanced", "uniform")


class Requests(Protocol):
    """Numbered requests: a dict each, with its number as ``index``, or ``{"corrupt": path}`` for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, int | Tensor]: ...


class _Batches(Dataset):
    """One batch of requests for each part of a shard."""

    def __init__(self, requests: Requests):
        self.requests = requests

    def __getitem__(self, part: ShardPart) -> dict[str, Any]:
        items = [self.requests[index] for index in part.rows]
        good = [item for item in items if "corrupt" not in item]
        corrupt = [item["corrupt"] for item in items if "corrupt" in item]
        batch = (default_collate(good) if good else {}) | ({"corrupt": corrupt} if corrupt else {})
        return batch | {"shard": part}


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class ShardLoader:
    """Batches of the shards that this worker takes, each cut from the shard's start.

    The composition of a batch depends on the sizes of batches and shards alone, not on the worker or the time.

    Args:
        requests: all of them.
        batch_size: requests per batch; the last batch of a shard may be smaller.
        context: gives the shards; the next one when the batches of the last have been used, or are read by processes.
        num_workers: processes that read requests.
    """

    def __init__(self, requests: Requests, batch_size: int, context: SamplingContext, num_workers: int = 0):
        self.requests, self.batch_size, self.context, self.num_workers = requests, batch_size, context, num_workers

    def __len__(self) -> int:
        """The most batches that there may be."""
        return sum(len(cut(shard, self.batch_size)) for shard in self.context.shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._batches(self.context.take(), self.num_workers)
        # Not read ahead: reclaiming means waiting, and no shard of this worker may lie unfinished meanwhile.
        yield from self._batches(self.context.reclaim(), 0)

    def _batches(self, shards: Iterable[range], num_workers: int) -> Iterator[dict[str, Any]]:
        parts = (ShardPart(shard, rows) for shard in shards for rows in cut(shard, self.batch_size))
        options = {"num_workers": num_workers, "collate_fn": _unchanged, "generator": torch.Generator()}
        yield from DataLoader(_Batches(self.requests), sampler=parts, batch_size=None, **options)


class RequestData(L.LightningDataModule):
    """Requests in shards, for a task that samples them.

    Attributes:
        requests: all of them.
        batch_size: requests per batch and device.
        shard_size: requests per shard; None takes the shard size of the run folder, for a new one the batch size.
        num_workers: processes per device that read requests.
    """

    requests: Requests
    batch_size: int
    shard_size: int | None
    num_workers: int = 0

    def __init__(self) -> None:
        super().__init__()
        # A rank may find nothing left to do, which is fine here.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def __len__(self) -> int:
        return len(self.requests)

    def predict_dataloader(self) -> ShardLoader:
        """Batches of the shards that the context of the task gives; if nothing is written, ranks take batches in turn."""
        trainer = self.trainer
        context = trainer.lightning_module.context if trainer and trainer.lightning_module else SamplingContext()
        if context.store is None:
            rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
            context = SamplingContext(cut(range(len(self)), self.batch_size)[rank::ranks])
        return ShardLoader(self.requests, self.batch_size, context, self.num_workers)


def check_numbers(**values: tuple[int, int]) -> None:
    """Raise ConfigurationError for the first option of the data module, ``name=(value, least)``, that is below its least."""
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigurationError(f"data.{name} must be at least {least}, got {value}")


class SampleRequests(RequestData):
    """Numbered requests ``{index, label, seed}``, in shards of consecutive indices that workers take.

    Args:
        num_samples: how many.
        num_classes: how many classes there are.
        labels: ``balanced`` (index modulo number of classes), ``uniform`` (random, from the sample's own stream), one class
            number for all, or the path of a text file with one class number per line.
        seed: of every sample, ≥ 0; a sample is a function of (configuration, seed, index) alone.
        batch_size: samples per batch and device.
        shard_size: samples that are written together; a run that stops loses the samples of unwritten shards. None takes that
            of the folder, or the batch size.

    Raises:
        ConfigurationError: numbers out of range, a class outside 0 … num_classes − 1, or a label file that does not fit.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int = 1000,
        labels: int | str = "balanced",
        seed: int = 0,
        batch_size: int = 64,
        shard_size: int | None = None,
    ):
        super().__init__()
        check_numbers(
            num_samples=(num_samples, 1),
            num_classes=(num_classes, 1),
            batch_size=(batch_size, 1),
            shard_size=(1 if shard_size is None else shard_size, 1),
            seed=(seed, 0),
        )
        self.num_samples, self.num_classes, self.batch_size, self.seed = num_samples, num_classes, batch_size, seed
        self.labels, self.shard_size, self.requests = labels, shard_size, self
        self._fixed = self._fixed_labels(labels)

    def _fixed_labels(self, labels: int | str) -> list[int] | None:
        if labels in POLICIES:
            return None
        try:
            labels = int(labels)
        except ValueError:
            path = Path(str(labels))
            if not path.is_file():
                raise ConfigurationError(
                    f"data.labels: {labels!r} is neither {' nor '.join(POLICIES)}, nor a class number, nor a file"
                ) from None
            lines = path.read_text().split()
            if len(lines) < self.num_samples or not all(line.lstrip("-").isdigit() for line in lines):
                raise ConfigurationError(
                    f"{path}: expected at least {self.num_samples} class numbers, one per line; found {len(lines)} entries"
                ) from None
            classes = [int(line) for line in lines[: self.num_samples]]
        else:
            classes = [labels] * self.num_samples
        for row, label in enumerate(classes):
            if not 0 <= label < self.num_classes:
                raise ConfigurationError(
                    f"data.labels: sample {row} asks for class {label}, outside 0 … {self.num_classes - 1}"
                )
        return classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, int]:
        if self._fixed is not None:
            label = self._fixed[index]
        elif self.labels == "uniform":
            label = random_label(self.seed, index, self.num_classes)
        else:
            label = index % self.num_classes
        return {"index": index, "label": label, "seed": self.seed}
