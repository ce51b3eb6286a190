"""What to sample: index, class and seed of every sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from calib_guidance.errors import ConfigurationError
from calib_guidance.rng import random_label

POLICIES = ("balanced", "uniform")


class Requests(Protocol):
    """Numbered requests: a dict each, with its number as ``index``, or ``{"corrupt": path}`` for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, int | Tensor]: ...


class _Batches(IterableDataset):
    """The batches of one rank. Their composition depends on the batch size alone, not on the number of ranks or workers."""

    def __init__(self, requests: Requests, batch_size: int, rank: int, world_size: int):
        self.requests, self.batch_size = requests, batch_size
        self.starts = range(0, len(requests), batch_size)[rank::world_size]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # The loader takes one batch from each worker in turn, so that strides give the order of a single process.
        worker = get_worker_info()
        starts = self.starts if worker is None else self.starts[worker.id :: worker.num_workers]
        for start in starts:
            rows = range(start, min(start + self.batch_size, len(self.requests)))
            items = [self.requests[i] for i in rows]
            good = [item for item in items if "corrupt" not in item]
            corrupt = [item["corrupt"] for item in items if "corrupt" in item]
            yield (default_collate(good) if good else {}) | ({"corrupt": corrupt} if corrupt else {})


def request_loader(requests: Requests, batch_size: int, trainer: L.Trainer, num_workers: int = 0) -> DataLoader:
    """Batches of consecutive requests, which the ranks of ``trainer`` take in turn."""
    batches = _Batches(requests, batch_size, trainer.global_rank, trainer.world_size)
    return DataLoader(batches, batch_size=None, num_workers=num_workers)


def check_numbers(**values: tuple[int, int]) -> None:
    """Raise ConfigurationError for the first option of the data module, ``name=(value, least)``, that is below its least."""
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigurationError(f"data.init_args.{name} must be at least {least}, got {value}")


class SampleRequests(L.LightningDataModule):
    """Numbered requests ``{index, label, seed}``, in batches of consecutive indices that ranks take in turn.

    Args:
        num_samples: how many.
        num_classes: how many classes there are.
        labels: ``balanced`` (index modulo number of classes), ``uniform`` (random, from the sample's own stream), one class
            number for all, or the path of a text file with one class number per line.
        seed: of every sample, ≥ 0; a sample is a function of (configuration, seed, index) alone.
        batch_size: samples per batch and device.

    Raises:
        ConfigurationError: numbers out of range, a class outside 0 … num_classes − 1, or a label file that does not fit.
    """

    # With fewer batches than ranks some ranks have nothing to do, which is fine here.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        num_samples: int,
        num_classes: int = 1000,
        labels: int | str = "balanced",
        seed: int = 0,
        batch_size: int = 64,
    ):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        check_numbers(
            num_samples=(num_samples, 1), num_classes=(num_classes, 1), batch_size=(batch_size, 1), seed=(seed, 0)
        )
        self.num_samples, self.num_classes, self.batch_size, self.seed = num_samples, num_classes, batch_size, seed
        self.labels = labels
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

    def predict_dataloader(self) -> DataLoader:
        return request_loader(self, self.batch_size, self.trainer)
