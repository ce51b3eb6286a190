"""What to sample or denoise: numbered requests, in batches of the shards that workers take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from calib_guidance.backend.text import read_text
from calib_guidance.data.base import printable
from calib_guidance.data.loading import DataModule, SkippedImages, check_at_least, collate
from calib_guidance.diffusion.rng import random_label
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.context import SamplingContext, ShardPart
from calib_guidance.runs.store import cut

POLICIES = ("balanced", "uniform")


# A dict each, with its number as ``index``; or a report, see ``collate``.
Requests = Sequence[dict[str, Any]]


class ShardLoader:
    """Batches of the shards that this worker takes, each cut from the shard's start.

    What a batch holds depends on the sizes of batches and shards alone. The context gives the next shard when the batches of the
    last have been used, or are read by processes.
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
        cuts = (ShardPart(shard, rows) for shard in shards for rows in cut(shard, self.batch_size))
        parts, read = itertools.tee(cuts)
        options = {"num_workers": num_workers, "collate_fn": collate, "generator": torch.Generator()}
        batches = DataLoader(self.requests, batch_sampler=(part.rows for part in read), **options)
        for part, batch in zip(parts, batches, strict=True):
            yield batch | {"shard": part}


class RequestData(DataModule):
    """Requests in shards, for a task that samples them."""

    class_names: str | Sequence[str] | None = None  # see read_class_names
    requests: Requests  # all of them
    batch_size: int  # requests per device
    shard_size: int | None  # requests; None takes the shard size of the run folder, for a new one the batch size
    num_classes: int | None = None  # None until the task gives the model's
    num_workers: int = 0  # processes per device that read requests

    def _take(self, num_classes: int | None, seed: int, batch_size: int, shard_size: int | None, **count: int) -> None:
        """Check these options, and keep them but for ``count``."""
        check_at_least(1, **count, num_classes=num_classes, batch_size=batch_size, shard_size=shard_size)
        if not 0 <= seed < 2**63:  # what the column of seeds holds
            raise ConfigurationError(f"data.seed must be at least 0 and below 2**63, got {seed}")
        self.num_classes, self.seed, self.batch_size, self.shard_size = num_classes, seed, batch_size, shard_size

    def take_num_classes(self, num_classes: int | None) -> None:
        """Take the model's number of classes where none was stated. The task calls it before the first request."""
        self.num_classes = num_classes if self.num_classes is None else self.num_classes

    def __len__(self) -> int:
        return len(self.requests)

    def predict_dataloader(self) -> ShardLoader:
        """Batches of the shards that the context of the task gives; if nothing is written, ranks take batches in turn."""
        task = self.trainer and self.trainer.lightning_module
        context = task.context if task else SamplingContext()
        if context.store is None:
            rank, ranks = self.place
            context = SamplingContext(cut(range(len(self)), self.batch_size)[rank::ranks])
        return ShardLoader(self.requests, self.batch_size, context, self.num_workers)


class SampleRequests(RequestData):
    """Numbered requests ``{index, label, seed}``, in shards of consecutive indices that workers take.

    Args:
        num_samples: how many.
        num_classes: how many classes there are; None takes the model's.
        labels: ``balanced`` (index modulo number of classes), ``uniform`` (random, from the sample's own stream), one class
            number for all, or the path of a text file with one class number per line.
        seed: of every sample, ≥ 0; a sample is a function of (configuration, seed, index) alone.
        batch_size: samples per batch and device.
        shard_size: samples that are written together, all that a run loses which stops. None takes that of the folder, or the
            batch size.
        class_names: written with the samples: a list, ``imagenet``, or a text file with a name per line; None takes those of the
            guiding classifier.

    Examples:
        >>> data = SampleRequests(num_samples=4, num_classes=2)
        >>> [data.requests[i]["label"] for i in range(len(data))]
        [0, 1, 0, 1]
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int | None = None,
        labels: int | str = "balanced",
        seed: int = 0,
        batch_size: int = 64,
        shard_size: int | None = None,
        class_names: str | Sequence[str] | None = None,
    ):
        super().__init__()
        self._take(num_classes, seed, batch_size, shard_size, num_samples=num_samples)
        self.num_samples, self.labels, self.class_names, self.requests = num_samples, labels, class_names, self
        self._fixed = None if num_classes is None else self._fixed_labels(labels)

    def take_num_classes(self, num_classes: int | None) -> None:
        stated = self.num_classes
        super().take_num_classes(num_classes)
        if self.num_classes is None:
            raise ConfigurationError(
                "data.num_classes: neither the denoiser nor a classifier has classes: state how many"
            )
        if stated is None:
            self._fixed = self._fixed_labels(self.labels)

    def _fixed_labels(self, labels: int | str) -> list[int] | None:
        if labels in POLICIES:
            return None
        path = Path(str(labels))
        if str(labels).lstrip("-").isdecimal():
            words = [("data.labels:", str(labels))] * self.num_samples
        elif path.is_file():
            lines = read_text(path).splitlines()
            words = [(f"{path}, line {i}:", word) for i, line in enumerate(lines, 1) for word in line.split()]
        else:
            policies = " nor ".join(POLICIES)
            raise ConfigurationError(f"data.labels: {labels!r} is neither {policies}, nor a class number, nor a file")
        if len(words) < self.num_samples:
            count = f"{len(words)} class numbers, data.num_samples is {self.num_samples}"
            raise ConfigurationError(f"{path} has {count}: write as many, one per line")
        for where, word in words[: self.num_samples]:
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= self.num_classes:
                name, last = printable(word[:40]), self.num_classes - 1
                raise ConfigurationError(f"{where} {name!r} is not a class number from 0 to {last}")
        return [int(word) for _, word in words[: self.num_samples]]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._fixed is not None:
            label = self._fixed[index]
        elif self.labels == "uniform":
            label = random_label(self.seed, index, self.num_classes)
        else:
            label = index % self.num_classes
        return {"index": index, "label": label, "seed": self.seed}


class _DenoiseRequests(Dataset):
    """Requests without the data module, whose trainer the reading processes do not need."""

    def __init__(self, images: Dataset, draws_per_image: int, num_classes: int | None, seed: int):
        self.images, self.draws_per_image, self.num_classes, self.seed = images, draws_per_image, num_classes, seed

    def __len__(self) -> int:
        return self.draws_per_image * len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index % len(self.images)
        item = self.images[row]
        if "image" not in item:
            return item
        label, last = int(item["label"]), (self.num_classes or 0) - 1
        if label < 0 or (self.num_classes is not None and label > last):
            wrong = f"data.images: image {row} has the label {label}, outside 0 … {last} (data.num_classes)"
            return {"wrong": [wrong]}
        numbers = {"index": index, "source": int(item["index"]), "label": label, "seed": self.seed}
        return numbers | {key: item[key] for key in ("image", "note") if key in item}


class DenoiseRequests(RequestData):
    """Numbered requests ``{index, source, label, seed, image}``, in shards of consecutive indices that workers take.

    Request ``draw·len(images) + row`` is the image of that row, with step and noise of its own; ``source`` is the ``index``
    that the data set gives it.

    Args:
        images: map-style data set of dicts: ``image`` ``(C, H, W)`` in [-1, 1], ``label``, ``index``. Random augmentations
            would make the result depend on the order of work.
        num_classes: how many classes there are; None takes the denoiser's.
        draws_per_image: how often every image is denoised.
        seed: of every request, ≥ 0; a denoised image is a function of (configuration, seed, index) alone.
        batch_size: images per batch and device.
        shard_size: images that are written together, all that a run loses which stops. None takes that of the folder, or the
            batch size.
        num_workers: processes per device that read images; 0 reads in the main one.
        max_corrupt: fraction of the images that may be unreadable, in [0, 1]. They are skipped and named.

    Examples:
        >>> from calib_guidance.data import DigitImages
        >>> len(DenoiseRequests(DigitImages("heldout"), num_classes=10, draws_per_image=2))  # of 500 images
        1000
    """

    def __init__(
        self,
        images: Dataset,
        num_classes: int | None = None,
        draws_per_image: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        shard_size: int | None = None,
        num_workers: int = 0,
        max_corrupt: float = 0.01,
    ):
        super().__init__()
        self._take(num_classes, seed, batch_size, shard_size, draws_per_image=draws_per_image)
        check_at_least(0, num_workers=num_workers)
        self.corrupt = SkippedImages("data.images", max_corrupt)
        if not len(images):
            raise ConfigurationError("data.images: the data set holds no images")
        self.images, self.num_workers = images, num_workers
        self.class_names = getattr(images, "class_names", None)
        self.requests = _DenoiseRequests(images, draws_per_image, num_classes, seed)

    def take_num_classes(self, num_classes: int | None) -> None:
        super().take_num_classes(num_classes)
        self.requests.num_classes = self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the first image that can be read."""
        items = (self.images[row] for row in range(len(self.images)))
        item = next((item for item in items if "corrupt" not in item), None)
        if not (isinstance(item, dict) and {"image", "label", "index"} <= item.keys()):
            found = sorted(item) if isinstance(item, dict) else type(item).__name__
            expected = "a data set of dicts with image, label and index"
            raise ConfigurationError(f"data.images: expected {expected}, got {found}")
        return tuple(item["image"].shape)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        self.corrupt.count(self.corrupt.take(batch), len(self.images), getattr(self.images, "source", None))
        if "image" not in batch:  # the shard is written all the same
            batch |= dict.fromkeys(("index", "source", "label", "seed"), torch.zeros(0, dtype=torch.long))
            batch["image"] = torch.zeros(0, *self.image_shape)
        return batch

    def teardown(self, stage: str) -> None:
        self.corrupt.summarize()
