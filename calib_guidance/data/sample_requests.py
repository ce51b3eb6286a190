"""What to sample: index, class and seed of every sample."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from calib_guidance.diffusion.rng import random_label
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import RunFolder

POLICIES = ("balanced", "uniform")


class Requests(Protocol):
    """Numbered requests: a dict each, with its number as ``index``, or ``{"corrupt": path}`` for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, int | Tensor]: ...


def _collate(items: list[dict[str, int | Tensor]]) -> dict[str, object]:
    """One batch, with the paths of what cannot be read as ``corrupt``."""
    good = [item for item in items if "corrupt" not in item]
    corrupt = [item["corrupt"] for item in items if "corrupt" in item]
    return (default_collate(good) if good else {}) | ({"corrupt": corrupt} if corrupt else {})


class ShardLoader:
    """Batches of the shards that this worker takes, each cut from the shard's start.

    The composition of a batch depends on the sizes of batches and shards alone, not on who makes it, nor when.

    Args:
        requests: all of them.
        batch_size: requests per batch; the last of a shard may be smaller.
        take: gives the shards to be made; asked for the next one when the batches of the last have been used, or, where
            processes read ahead, when they are read.
        take_over: gives shards that other workers have left, when those are done.
        longest: the most batches that this may become.
        num_workers: processes that read requests.

    Attributes:
        shard, rows: what the last batch is of, and the requests that were asked for with it.
    """

    def __init__(
        self,
        requests: Requests,
        batch_size: int,
        take: Callable[[], Iterable[range]],
        take_over: Callable[[], Iterable[range]],
        longest: int,
        num_workers: int = 0,
    ):
        self.requests, self.batch_size, self.longest, self.num_workers = requests, batch_size, longest, num_workers
        self.take, self.take_over = take, take_over
        self.shard = self.rows = range(0)

    def __len__(self) -> int:
        return self.longest

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._batches(self.take(), self.num_workers)
        # Not read ahead: taking over means waiting, and nothing of its own may lie unfinished meanwhile.
        yield from self._batches(self.take_over(), 0)

    def _batches(self, shards: Iterable[range], num_workers: int) -> Iterator[dict[str, Tensor]]:
        asked: deque[tuple[range, range]] = deque()

        def rows() -> Iterator[range]:
            for shard in shards:
                for batch in cut(shard, self.batch_size):
                    asked.append((shard, batch))
                    yield batch

        options = {"num_workers": num_workers, "collate_fn": _collate, "generator": torch.Generator()}
        for batch in DataLoader(self.requests, batch_sampler=rows(), **options):
            self.shard, self.rows = asked.popleft()
            yield batch


def cut(rows: range, size: int) -> list[range]:
    """Consecutive pieces of ``size``, the last as long as is left."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class RequestData(L.LightningDataModule):
    """Requests in shards, which workers take from a :class:`~calib_guidance.runs.RunFolder`.

    Attributes:
        requests: all of them.
        batch_size: requests per batch and device.
        shard_size: requests per shard; None leaves it to the folder, and for a new one it is the batch size.
        num_workers: processes per device that read requests.
        run_folder: set by :class:`~calib_guidance.callbacks.SampleWriter`; without one, ranks take batches in turn.
        remaining: the shards of it that were not done when the run began.
    """

    requests: Requests
    batch_size: int
    shard_size: int | None
    num_workers: int = 0

    def __init__(self) -> None:
        super().__init__()
        # A rank may find nothing left to do, which is fine here.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.run_folder: RunFolder | None = None
        self.remaining: list[range] = []

    def __len__(self) -> int:
        return len(self.requests)

    def predict_dataloader(self) -> ShardLoader:
        folder = self.run_folder
        if folder is None:
            rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            blocks = cut(range(len(self)), self.batch_size)[rank::ranks]
            return ShardLoader(self.requests, self.batch_size, lambda: blocks, tuple, len(blocks), self.num_workers)
        longest = sum(len(cut(shard, self.batch_size)) for shard in self.remaining)
        take = functools.partial(folder.take, self.remaining)
        return ShardLoader(self.requests, self.batch_size, take, folder.reclaim, longest, self.num_workers)


def check_numbers(**values: tuple[int, int]) -> None:
    """Raise ConfigurationError for the first option of the data module, ``name=(value, least)``, that is below its least."""
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigurationError(f"data.init_args.{name} must be at least {least}, got {value}")


class SampleRequests(RequestData):
    """Numbered requests ``{index, label, seed}``, in shards of consecutive indices that workers take.

    Args:
        num_samples: how many.
        num_classes: how many classes there are.
        labels: ``balanced`` (index modulo number of classes), ``uniform`` (random, from the sample's own stream), one class
            number for all, or the path of a text file with one class number per line.
        seed: of every sample, ≥ 0; a sample is a function of (configuration, seed, index) alone.
        batch_size: samples per batch and device.
        shard_size: samples that are written together; what is not written is lost when a run is stopped. None takes that of
            the folder, or the batch size.

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
                    f"data.init_args.labels: {labels!r} is neither {' nor '.join(POLICIES)}, nor a class number, nor a file"
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
                    f"data.init_args.labels: sample {row} asks for class {label}, outside 0 … {self.num_classes - 1}"
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
