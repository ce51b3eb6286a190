"""Images as data sets of ``{"image", "label", "index"[, "t"]}``, by row number or as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from calib_guidance.backend.images import from_uint8
from calib_guidance.data.loading import hashed, seeded
from calib_guidance.errors import ConfigurationError

# What PIL's decoders raise on damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_INDEX_RANGE = 2**62


def contents(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None or image["path"] is None:
        return image["bytes"] or b""
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


@dataclass
class ImageReader:
    """Makes an item of a row of a data set.

    Args:
        split: for messages.
        image, label, time, index: names of the columns; the last two may be None.
        mode: PIL's, ``RGB`` or ``L``.
        transform: 8-bit image ``(C, H, W)`` to 8-bit image.
        labels: the number of each class of the data set; None where they are right already.
        num_classes: how many there are.
        shape: ``(C, H, W)`` that the transform has to make.
        seed: of the transform's random numbers, which are a function of (seed, epoch, index); None for one that draws none.
    """

    split: str
    image: str
    label: str
    time: str | None
    index: str | None
    mode: str
    transform: nn.Module
    labels: list[int] | None
    num_classes: int
    shape: tuple[int, int, int]
    seed: int | None

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.image, self.label, self.time, self.index) if name is not None]

    def wrong_label(self, label: int | None, place: str) -> str | None:
        """What is wrong with a label of the data set, or None."""
        known = self.num_classes if self.labels is None else len(self.labels)
        if label is not None and 0 <= label < known:
            return None
        return f"{place}: label {label} is outside 0 … {known - 1}"

    def __call__(self, row: dict[str, Any], place: str, index: int | None, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The item; ``{"corrupt": path}`` where the image cannot be read, ``{"wrong": message}`` where its label cannot be.

        Args:
            row: of the data set, with the image as ``{"bytes", "path"}``.
            place: of the row, for messages; may be empty.
            index: of the sample; None takes a hash of the file.
            epoch: for random numbers.
            draw: of several of the same image, which get different hashes.
        """
        image = row[self.image] or {"bytes": None, "path": None}
        path = image["path"] or ""
        # A file has a path of its own; what lies inside another file at most a name.
        name = path if "/" in path else ", ".join(filter(None, (f"split {self.split!r}", place, path)))
        if wrong := self.wrong_label(row[self.label], name):
            return {"wrong": wrong}
        try:
            data = contents(image)
            with Image.open(io.BytesIO(data)) as picture:
                pixels = pil_to_tensor(picture.convert(self.mode))
        except DECODING_ERRORS as error:
            # PIL's own message names an address in memory; the same image has to look the same every time.
            why = "not an image" if isinstance(error, UnidentifiedImageError) else repr(error)
            return {"corrupt": f"{name} ({why})"}
        if index is None:
            digest = hashlib.blake2b(data, digest_size=8, salt=draw.to_bytes(8, "little")).digest()
            index = int.from_bytes(digest, "little") % _INDEX_RANGE
        with contextlib.nullcontext() if self.seed is None else seeded(self.seed, epoch, index):
            pixels = self.transform(pixels)
        if tuple(pixels.shape) != self.shape:
            return {
                "wrong": f"{name}: the transform makes it {tuple(pixels.shape)}, where {self.shape} is expected: give "
                "data.init_args.train_transform a resize or crop to data.init_args.image_size"
            }
        label = row[self.label] if self.labels is None else self.labels[row[self.label]]
        item = {"image": from_uint8(pixels), "label": label, "index": index}
        return item if self.time is None else {**item, "t": row[self.time]}


class ImageRows(Dataset):
    """Images by row number.

    Args:
        rows: with the columns of ``reader``.
        reader: makes an item of a row.
        draws: each image this many times: item i is row i mod n, its index is draw · (largest index + 1) + that of the row.

    Raises:
        ConfigurationError: a label is outside the range.
    """

    def __init__(self, rows: datasets.Dataset, reader: ImageReader, draws: int = 1):
        self.rows, self.reader, self.draws, self.epoch = rows.select_columns(reader.columns), reader, draws, 0
        columns = rows.select_columns([name for name in (reader.label, reader.index) if name]).with_format("arrow")[:]
        labels = columns[reader.label].to_pylist()
        for row, label in enumerate(labels):
            if wrong := reader.wrong_label(label, f"split {reader.split!r}, row {row}"):
                raise ConfigurationError(wrong)
        indices = None if reader.index is None else columns[reader.index].to_numpy()
        self.stride = len(rows) if indices is None else int(indices.max()) + 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows) * self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        draw, number = divmod(i, len(self.rows))
        row = self.rows[number]
        index = number if self.reader.index is None else row[self.reader.index]
        return self.reader(row, f"row {number}", draw * self.stride + index, self.epoch)


class ImageStream(IterableDataset):
    """One device's share of a streamed data set, once or several times, in order.

    The place in the stream is its state: which pass, where the current block of rows starts, how many of it are taken. To go on,
    that block is read again.

    Args:
        rows: the share of this device.
        reader: makes an item of a row.
        draws: how many passes.
    """

    block_size = 1

    def __init__(self, rows: datasets.IterableDataset, reader: ImageReader, draws: int = 1):
        self.rows, self.reader, self.draws, self.epoch = rows, reader, draws, 0
        self._place: dict[str, Any] = {}
        self._resume: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = dict(state_dict)

    def passes(self, first: int) -> Iterable[int]:
        return range(first, self.draws)

    def shard_order(self, number: int) -> int:
        """Of the files in one pass: a random order for each number > 0."""
        return 0

    def block_order(self, number: int, block: int, size: int) -> list[int]:
        return list(range(size))

    def _index(self, row: dict[str, Any], draw: int) -> int | None:
        return None if self.reader.index is None else (row[self.reader.index] + draw * hashed(0)) % _INDEX_RANGE

    def __iter__(self) -> Iterator[dict[str, Any]]:
        resume, self._resume = self._resume, {}
        # A new object in each worker: the epoch of an IterableDataset lies in memory that processes share.
        rows = self.rows.select_columns(self.reader.columns)
        for number in self.passes(resume.get("pass", 0)):
            start, block, skip = resume.get("start"), resume.get("block", 0), resume.get("taken", 0)
            resume = {}
            rows.set_epoch(self.shard_order(number))
            rows.load_state_dict(start or {})
            source = iter(rows)
            empty = start is None
            while chunk := list(itertools.islice(source, self.block_size)):
                empty = False
                for taken, i in enumerate(self.block_order(number, block, len(chunk))[skip:], skip + 1):
                    self._place = {"pass": number, "start": start, "block": block, "taken": taken}
                    # To train on, an image is the same one in every pass; held out, each pass is another draw of it.
                    draw = number % self.draws
                    yield self.reader(chunk[i], "", self._index(chunk[i], draw), self.epoch, draw)
                start, block, skip = rows.state_dict(), block + 1, 0
            if empty:
                return


class TrainImageStream(ImageStream):
    """One device's share of a streamed data set, over and over, shuffled by (seed, epoch, pass).

    The files come in random order, and rows in random order within blocks.

    Args:
        rows: the share of this device.
        reader: makes an item of a row.
        seed: of the order.
        block_size: how many rows are shuffled at a time; each worker holds so many encoded images.
        samples: of an epoch on this device.
    """

    def __init__(self, rows: datasets.IterableDataset, reader: ImageReader, seed: int, block_size: int, samples: int):
        super().__init__(rows, reader)
        self.seed, self.block_size, self.samples = seed, block_size, samples

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def passes(self, first: int) -> Iterable[int]:
        return itertools.count(first)

    def shard_order(self, number: int) -> int:
        return 1 + (hashed(self.seed, self.epoch, number) >> 32)

    def block_order(self, number: int, block: int, size: int) -> list[int]:
        generator = torch.Generator().manual_seed(hashed(self.seed, self.epoch, number, block))
        return torch.randperm(size, generator=generator).tolist()
