"""Images to train on, as items ``{"image", "label", "index"[, "t"]}``, by position or as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from calib_guidance.backend.images import from_uint8
from calib_guidance.data.base import IndexedSource, Row
from calib_guidance.data.loading import hashed, seeded
from calib_guidance.data.preprocess import FIRST_FRAME, UnreadableImageError, contents, decode
from calib_guidance.errors import ConfigurationError, first_line

if TYPE_CHECKING:
    import datasets

    from calib_guidance.data.tables import StreamedImages

_INDEX_RANGE = 2**62
_ATTEMPTS = 1000  # to find a readable image in place of a corrupt one


@dataclass
class ImageReader:
    """Makes an item of a row of a source."""

    mode: str  # PIL's, RGB or L
    transform: nn.Module  # of 8-bit images
    labels: list[int] | None  # the number of each class of the source; None where they are right already
    num_classes: int
    shape: tuple[int, int, int]  # (C, H, W) that the transform has to make
    seed: int | None  # of its random numbers, a function of (seed, epoch, index); None where it draws none

    def __post_init__(self) -> None:
        self._transformed(torch.zeros(self.shape, dtype=torch.uint8), "")

    def _transformed(self, pixels: Tensor, where: str) -> Tensor:
        made = self.transform(pixels)
        shape, dtype = getattr(made, "shape", ()), getattr(made, "dtype", type(made).__name__)
        if tuple(shape) != self.shape or dtype != torch.uint8:
            raise ConfigurationError(
                f"{where}data.train_transform has to make 8-bit images of shape {self.shape}; it made {dtype} of shape "
                f"{tuple(shape)}. Give it a resize or crop to data.image_size, and no conversion to floats"
            )
        return made

    def wrong_label(self, label: int, name: str) -> str | None:
        """What is wrong with a label of the source, or None."""
        known = self.num_classes if self.labels is None else len(self.labels)
        return None if 0 <= label < known else f"{name}: label {label} is outside 0 … {known - 1}"

    def __call__(self, row: Row, index: int | None, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The item; of an image that cannot be read only reports, see :func:`~calib_guidance.data.loading.collate`.

        Without an ``index`` it is a hash of the file, another one for each ``draw`` of the same image.
        """
        from torchvision.transforms.v2.functional import pil_to_tensor

        if wrong := self.wrong_label(row.label, row.name):
            return {"wrong": [wrong]}
        try:
            data = contents(row)
            picture, done = decode(data, self.mode)
            if index is None:
                digest = hashlib.blake2b(data, digest_size=8, salt=draw.to_bytes(8, "little")).digest()
                index = int.from_bytes(digest, "little") % _INDEX_RANGE
            with contextlib.nullcontext() if self.seed is None else seeded(self.seed, epoch, index):
                pixels = self._transformed(pil_to_tensor(picture), f"{row.name}: ")
        except UnreadableImageError as error:
            return {"corrupt": [f"{row.name} ({error})"]}
        except ConfigurationError as error:  # a worker would make a traceback of it
            return {"wrong": [str(error)]}
        label = row.label if self.labels is None else self.labels[row.label]
        item = {"image": from_uint8(pixels), "label": label, "index": index}
        if row.time is not None:
            item["t"] = row.time
        if done & FIRST_FRAME:
            item["note"] = [f"{row.name}: of its several frames or pages, only the first is read"]
        return item


class ImageRows(Dataset):
    """Images by position, each ``draws`` times: row i mod n, with the index draw · (largest index + 1) + that of the row."""

    def __init__(self, source: IndexedSource, reader: ImageReader, draws: int = 1):
        self.source, self.reader, self.draws, self.epoch = source, reader, draws, 0
        for position, label in enumerate(source.column("label").tolist()):
            if wrong := reader.wrong_label(label, f"{source.where}, row {position}"):
                raise ConfigurationError(wrong)
        indices = source.column("index")
        self.stride = source.num_images if indices is None else int(indices.max()) + 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.source.num_images * self.draws

    def mixed(self) -> list[int]:
        """All items in an order whose every beginning has all classes in proportion."""
        order = self.source.mixed().tolist()
        return [draw * len(order) + i for draw in range(self.draws) for i in order]

    def _item(self, i: int) -> dict[str, Any]:
        draw, position = divmod(i, self.source.num_images)
        row = self.source[position]
        return self.reader(row, draw * self.stride + (position if row.index is None else row.index), self.epoch)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)  # which ends a loop over all items
        item, corrupt = self._item(i), []
        # Batches to train on are full: random readable images stand in for corrupt ones.
        while "corrupt" in item and self.reader.seed is not None and len(corrupt) < _ATTEMPTS:
            corrupt += item["corrupt"]
            item = self._item(hashed(self.reader.seed, self.epoch, i, len(corrupt)) % len(self))
        return {**item, "corrupt": corrupt + item.get("corrupt", [])} if corrupt else item


class ImageStream(IterableDataset):
    """One device's part of a streamed data set.

    Held out, rows come in order, ``draws`` times. To train on, they come over and over, shuffled by (seed, epoch, pass): files
    in random order, rows in random order within blocks.

    The state is the position in the stream: the pass, the start of the current block of rows, and how many of them are taken. A
    resumed stream reads that block again.
    """

    def __init__(
        self,
        source: IndexedSource | StreamedImages,
        rows: datasets.IterableDataset,  # the part of this device of source.stream
        reader: ImageReader,
        draws: int = 1,  # passes over held-out images; each one is another draw of them
        seed: int | None = None,  # of the order to train in; None for held-out images
        block_size: int = 1,  # rows that are shuffled at a time; each worker holds so many encoded images
        samples: int | None = None,  # of an epoch of training on this device
    ):
        self.source, self.rows, self.reader, self.draws, self.epoch = source, rows, reader, draws, 0
        self.seed, self.block_size, self.samples = seed, block_size, samples
        self._place: dict[str, Any] = {}
        self._resume: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.samples  # TypeError for held-out images, whose stream has no length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return dict(self._place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = dict(state_dict)

    def _order(self, size: int, *key: int) -> list[int]:
        if self.seed is None:
            return list(range(size))
        generator = torch.Generator().manual_seed(hashed(self.seed, self.epoch, *key))
        return torch.randperm(size, generator=generator).tolist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from calib_guidance.data.tables import READING_ERRORS

        resume, self._resume, corrupt = self._resume, {}, []
        # A new object in each worker: the epoch of an IterableDataset lies in memory that processes share.
        rows = self.rows.select_columns([*self.rows.features])
        first = resume.get("pass", 0)
        for number in range(first, self.draws) if self.seed is None else itertools.count(first):
            start, block, skip = resume.get("start"), resume.get("block", 0), resume.get("taken", 0)
            resume = {}
            # Files come in random order for each number > 0.
            rows.set_epoch(0 if self.seed is None else 1 + (hashed(self.seed, self.epoch, number) >> 32))
            rows.load_state_dict(start or {})
            source = iter(rows)
            empty = start is None
            while True:
                try:
                    chunk = list(itertools.islice(source, self.block_size))
                except READING_ERRORS as error:
                    yield {"wrong": [f"{self.source.where} is damaged: {first_line(error)}"]}
                    return
                if not chunk:
                    break
                empty = False
                for taken, i in enumerate(self._order(len(chunk), number, block)[skip:], skip + 1):
                    self._place = {"pass": number, "start": start, "block": block, "taken": taken}
                    row = self.source.row(chunk[i])
                    # To train on, an image is the same one in every pass; held out, each pass is another draw of it.
                    draw = number % self.draws
                    index = None if row.index is None else (row.index + draw * hashed(0)) % _INDEX_RANGE
                    item = self.reader(row, index, self.epoch, draw)
                    if "corrupt" in item and self.seed is not None and len(corrupt) < _ATTEMPTS:
                        corrupt += item["corrupt"]  # the next readable image reports them, so that batches are full
                        continue
                    yield {**item, "corrupt": corrupt + item.get("corrupt", [])} if corrupt else item
                    corrupt = []
                start, block, skip = rows.state_dict(), block + 1, 0
            if empty:
                return
