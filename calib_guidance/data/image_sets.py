"""Anybody's 8-bit images, in a fixed order: a run's, an ``.npz``, a folder, parquet, or a data set of ``datasets``.

Every kind gives the same batches of the same images, and says what was done to them, since that is what figures differ by.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import logging
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.data.image_datasets import DECODING_ERRORS, contents
from calib_guidance.data.loading import CorruptImages
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import CorruptedShardError, RunFolder

log = logging.getLogger(__name__)

RESIZES = {
    "adm": "halved (box) while both sides stay at least the size, shorter side to the size (bicubic), middle cropped: ADM",
    "lanczos": "middle square cropped, then resized (Lanczos): StyleGAN's and EDM's dataset tools",
}
MODES = ("RGB", "L")
# What may have to be done to an image before it is grey or RGB. Place in the list = bit in the record of each image.
CONVERSIONS = (
    "alpha channel dropped, all of it opaque",
    "alpha channel dropped of transparent images: the colours beneath count, as in torch-fidelity",
    "palette, CMYK and others to RGB",
    "grey to RGB",
    "RGB to grey",
    "enlarged to the size",
)
_OPAQUE, _TRANSPARENT, _TO_RGB, _GREY_TO_RGB, _RGB_TO_GREY, _ENLARGED = (1 << bit for bit in range(len(CONVERSIONS)))
_SPLITS = {"train", "val", "valid", "validation", "test"}
_NAMED = 10  # unreadable images in a provenance
_IMAGE_COLUMNS = ("image", "img", "png", "jpg")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


class ImageBatch(NamedTuple):
    """Images of a set.

    Attributes:
        image: uint8 ``(N, C, H, W)``, C = 1 or 3, on the CPU.
        label: int64 ``(N,)``, −1 where unknown.
        index: int64 ``(N,)``, the place in the set's order; of a run, the sample's number.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class _Row(NamedTuple):
    place: int  # in the set's order
    name: str  # for messages
    source: bytes | Path | np.ndarray  # encoded, a file, or pixels (H, W, C)
    label: int
    index: int


class _Decoded(NamedTuple):
    row: _Row
    pixels: np.ndarray | None  # (C, H, W)
    digest: bytes
    conversions: int
    problem: str


def _adm_crop(picture: Image.Image, size: int) -> Image.Image:
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _lanczos_crop(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


_CROPS = {"adm": _adm_crop, "lanczos": _lanczos_crop}


def _plain(picture: Image.Image, name: str) -> tuple[Image.Image, int]:
    """A picture as grey or RGB, and what was done to it.

    Raises:
        ConfigurationError: more than 8 bits.
    """
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        raise ConfigurationError(f"{name} has more than 8 bits a channel ({picture.mode}): save it with 8 bits")
    if picture.mode in ("L", "RGB"):
        done = 0
        if "transparency" in picture.info:  # one colour stands for transparent
            done = _TRANSPARENT if picture.convert("RGBA").getextrema()[-1][0] < 255 else _OPAQUE
        return picture, done
    if picture.mode == "1":
        return picture.convert("L"), 0
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        straight = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
        done = _OPAQUE if straight.getextrema()[-1][0] == 255 else _TRANSPARENT
        return straight.convert("L" if straight.mode == "LA" else "RGB"), done
    return picture.convert("RGB"), _TO_RGB


class ImageSet(ABC):
    """Images in a fixed order; each is read when its batch is asked for, and so often.

    Images that cannot be read are skipped, named and counted.

    Args:
        name: path or id, as given.
        num_images: how many there are, unreadable ones included.
        size: side to which images are resized and cropped; None leaves them as they are.
        resize: how, one of :data:`RESIZES`.
        mode: ``RGB`` or ``L`` (grey) that images are converted to; None leaves them as they are.
        max_corrupt: share of images that may be unreadable, in [0, 1].

    Attributes:
        image_shape: ``(C, H, W)`` of every image, that of the first one that can be read.
        labelled: whether the classes of images are known.
        num_classes: how many there are, where the source says so.

    Raises:
        ConfigurationError: no images, or none that can be read.
    """

    kind: str
    labelled = False
    num_classes: int | None = None

    def __init__(self, name: str, num_images: int, size: int | None, resize: str, mode: str | None, max_corrupt: float):
        if not num_images:
            raise ConfigurationError(f"{name} holds no images")
        self.name, self.num_images = name, num_images
        self.size, self.resize, self.mode = size, resize, mode
        self._corrupt = CorruptImages(name, max_corrupt, "--max-corrupt")
        self._problems: dict[int, tuple[str, str]] = {}
        # What became of each image: kept by place, so that it may be read twice, and by any process, and counts once.
        self._digests = np.zeros((num_images, 32), np.uint8)
        self._done = np.zeros(num_images, np.uint8)
        self._first: dict[tuple[int, ...], str] = {}
        first = self._first_readable()
        self.image_shape: tuple[int, int, int] = first.pixels.shape
        self._first[self.image_shape] = first.row.name

    @abstractmethod
    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        """The rows of each of some blocks of places, which ascend and do not overlap."""

    def _first_readable(self) -> _Decoded:
        reasons = []
        for (row,) in self._read(range(place, place + 1) for place in range(self.num_images)):
            decoded = self._decode(row)
            if decoded.pixels is not None:
                return decoded
            reasons.append(f"{row.name} ({decoded.problem})")
            self._corrupt.count(reasons[-1:], self.num_images)
        raise ConfigurationError(f"{self.name}: no image can be read: {', '.join(reasons[:_NAMED])}")

    def _decode(self, row: _Row) -> _Decoded:
        source, done = row.source, 0
        try:
            if isinstance(source, np.ndarray):
                picture = Image.fromarray(source[:, :, 0] if source.shape[2] == 1 else source)
            else:
                picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
                picture.load()
        except DECODING_ERRORS as error:
            # PIL's own message names an address in memory; the same image has to look the same every time.
            why = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
            return _Decoded(row, None, b"", 0, why)
        picture, done = _plain(picture, row.name)
        if self.mode is not None and picture.mode != self.mode:
            done |= _GREY_TO_RGB if self.mode == "RGB" else _RGB_TO_GREY
            picture = picture.convert(self.mode)
        if self.size is not None:
            if min(picture.size) < self.size:
                done |= _ENLARGED
            picture = _CROPS[self.resize](picture, self.size)
        pixels = np.asarray(picture)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes() + pixels.tobytes()).digest()
        return _Decoded(row, pixels, digest, done, "")

    def _check_shape(self, shape: tuple[int, ...], name: str) -> None:
        if shape == self.image_shape:
            return
        (channels, *size), (first_channels, *first_size) = shape, self.image_shape
        first = self._first[self.image_shape]
        if size != first_size:
            raise ConfigurationError(
                f"{self.name} has images of several sizes (height×width): {'×'.join(map(str, first_size))} (first {first}) and "
                f"{'×'.join(map(str, size))} (first {name}). --size N resizes and crops all of them to N×N, as --resize says"
            )
        grey, colour = (name, first) if channels < first_channels else (first, name)
        raise ConfigurationError(
            f"{self.name} has grey images (first {grey}) and colour ones (first {colour}). --mode RGB makes grey ones colour, as "
            "ADM and torch-fidelity read them; --mode L makes all grey"
        )

    def _take(self, decoded: Sequence[_Decoded]) -> ImageBatch | None:
        """A batch of what can be read, None where nothing can; keeps account of all of it."""
        good = [item for item in decoded if item.pixels is not None]
        bad = [item for item in decoded if item.pixels is None]
        for item in bad:
            self._problems[item.row.place] = (item.row.name, item.problem)
        self._corrupt.count([f"{item.row.name} ({item.problem})" for item in bad], self.num_images)
        for item in good:
            self._check_shape(item.pixels.shape, item.row.name)
            self._digests[item.row.place] = np.frombuffer(item.digest, np.uint8)
            self._done[item.row.place] = item.conversions
        if not good:
            return None
        return ImageBatch(
            torch.from_numpy(np.stack([item.pixels for item in good])),
            torch.tensor([item.row.label for item in good]),
            torch.tensor([item.row.index for item in good]),
        )

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """This process's share of the images, in order.

        Batch b is made of the places from b · ``batch_size`` on, whatever the number of processes, and is that of process
        b mod ``world_size``.

        Raises:
            ConfigurationError: images of several sizes, grey and colour mixed, more than 8 bits, too many that cannot be read, or
                a source that is damaged or has changed.
        """
        starts = range(rank * batch_size, self.num_images, world_size * batch_size)
        blocks = (range(start, min(start + batch_size, self.num_images)) for start in starts)
        # Decoders let go of Python's lock. One batch is read ahead while the last one is used.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            ahead: deque[list[Future[_Decoded]]] = deque()
            for rows in itertools.chain(self._read(blocks), [None]):
                if rows is not None:
                    ahead.append([pool.submit(self._decode, row) for row in rows])
                while len(ahead) > (0 if rows is None else 1):
                    batch = self._take([future.result() for future in ahead.popleft()])
                    if batch is not None:
                        yield batch

    def gather(self, processes: DistributedContext) -> None:
        """Make what each process found out about its share known to all; each has to call it, when it has read its share.

        Raises:
            ConfigurationError: too many images, over all processes, that cannot be read.
        """
        places = np.flatnonzero(self._digests.any(1))
        everyone = processes.gather_rows(torch.from_numpy(places)).numpy()
        self._digests[everyone] = processes.gather_rows(torch.from_numpy(self._digests[places])).cpu().numpy()
        self._done[everyone] = processes.gather_rows(torch.from_numpy(self._done[places])).cpu().numpy()
        for problems in processes.gather(self._problems):
            self._problems.update(problems)
        reports = [f"{name} ({why})" for name, why in self.unreadable]
        if not processes.is_first:  # which says what others met
            self._corrupt.names.update(reports)
        self._corrupt.count(reports, self.num_images)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """``(file or row, reason)`` of the images met so far that cannot be read, in order."""
        return [self._problems[place] for place in sorted(self._problems)]

    @property
    def sha256(self) -> str | None:
        """Of the images as measured, in whatever order and kind of file; None before each has been read, see :meth:`gather`."""
        seen = self._digests.any(1)
        if seen.sum() + len(self._problems) < self.num_images:
            return None
        return hashlib.sha256(b"".join(sorted(map(bytes, self._digests[seen])))).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What the images are and what was done to them, in JSON's types; complete when each has been read.

        Returns:
            ``source``, ``kind``, ``num_images``, ``num_unreadable`` with the first of them as ``unreadable``, ``image_shape``,
            ``sha256`` (:attr:`sha256`), ``preprocessing`` (``size``, ``how``; None where images are as they were), ``mode``,
            ``decoder`` (library and version, which also resizes), ``conversions`` (how many images were subject to each),
            ``labelled``, and what the kind adds, such as the ``uint8_rule`` of a run.
        """
        counts = {name: int(((self._done >> bit) & 1).sum()) for bit, name in enumerate(CONVERSIONS)}
        return {
            "source": self.name,
            "kind": self.kind,
            "num_images": self.num_images,
            "num_unreadable": len(self._problems),
            "unreadable": [f"{name} ({why})" for name, why in self.unreadable[:_NAMED]],
            "image_shape": list(self.image_shape),
            "sha256": self.sha256,
            "preprocessing": None if self.size is None else {"size": self.size, "how": RESIZES[self.resize]},
            "mode": self.mode,
            "decoder": f"Pillow {PIL.__version__}",
            "conversions": {name: count for name, count in counts.items() if count},
            "labelled": self.labelled,
        }

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures should know of the images, a sentence each."""
        found = self.provenance()
        notes = [f"{count} of {self.num_images} images: {name}" for name, count in found["conversions"].items()]
        if self._problems:
            notes.append(
                f"{len(self._problems)} of {self.num_images} images cannot be read: {found['unreadable'][0]} …"
            )
        return notes


class RunImages(ImageSet):
    """The samples of a run, each file checked against its record."""

    kind = "run folder"
    labelled = True

    def __init__(self, name: str, **options: Any):
        self.run = RunFolder.open(name)
        states = {shard: self.run.state(shard) for shard in self.run.shards()}
        missing = [shard for shard, state in states.items() if state.name != "done"]
        if missing:
            why = states[missing[0]]
            raise ConfigurationError(
                f"{name} is not complete: {sum(map(len, missing))} of {self.run.num_requests} samples are missing or corrupted, "
                f"the first in {missing[0].start}–{missing[0][-1]} ({why.reason or why.name}). Re-run predict to complete them"
            )
        records = [self.run.record(shard) for shard in self.run.shards()]
        self.failed = sum(len(record["failed"]) for record in records)
        self.ends = np.cumsum([record["rows"] for record in records])
        super().__init__(name, int(self.ends[-1]), **options)

    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        number, columns = -1, {}
        for block in blocks:
            rows = []
            for place in block:
                wanted = int(np.searchsorted(self.ends, place, side="right"))
                if wanted != number:
                    number, columns = wanted, self._shard(wanted)
                i = place - (self.ends[number] - len(columns["index"]))
                label, index = columns["label"][i], columns["index"][i]
                rows.append(_Row(place, f"sample {index}", columns["image"][i]["bytes"], label, index))
            yield rows

    def _shard(self, number: int) -> dict[str, list]:
        shard = self.run.shards()[number]
        try:
            columns = pq.read_table(pa.BufferReader(self.run.read_bytes(shard))).to_pydict()
        except CorruptedShardError as error:
            raise ConfigurationError(f"{self.name}: {error}. Re-run predict to regenerate the shard") from error
        if len(columns["index"]) != self.ends[number] - (self.ends[number - 1] if number else 0):
            raise ConfigurationError(f"{self.name} changed while it was read: give the command again")
        return columns

    def provenance(self) -> dict[str, Any]:
        run = RunFolder.read_run(self.run.path)
        return super().provenance() | {
            "run": self.run.fingerprint,
            "uint8_rule": run["identity"].get("uint8_rule"),
            "failed": self.failed,
        }


class NpzImages(ImageSet):
    """``arr_0``, uint8 ``(N, H, W, C)``, and, where it is there, ``arr_1`` ``(N,)``, their classes: what ADM's sampling writes.

    Read from beginning to end, a batch at a time, compressed or not; checksums are compared.
    """

    kind = "npz"

    def __init__(self, name: str, **options: Any):
        self.path = Path(name).expanduser()
        with self._member("arr_0.npy") as file:
            self.shape, dtype, fortran = self._header(file)
        self._check(dtype, fortran)
        self.labels = self._labels()
        self.labelled = self.labels is not None
        super().__init__(name, self.shape[0], **options)

    def _member(self, member: str) -> zipfile.ZipExtFile:
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:  # an open member keeps the file open
            if member not in archive.namelist():
                there = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise ConfigurationError(
                    f"{self.path} has no {member.removesuffix('.npy')}, it has: {there}. Images are arr_0, uint8 (N, H, W, C), "
                    "as numpy.savez(file, images, labels) names them"
                )
            return archive.open(member)

    def _header(self, file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype, bool]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigurationError(f"{self.path}: {file.name} is no array of numpy's: {error}") from error
        return shape, dtype, fortran

    def _check(self, dtype: np.dtype, fortran: bool) -> None:
        where, shape = f"{self.path}: arr_0 is {dtype} {self.shape}", self.shape
        needed = "images are uint8 (N, H, W, C) with C = 1 or 3"
        if dtype != np.uint8:
            cure = {
                "O": "pickled objects are not loaded",
                "f": "make 8-bit images of it by the rule of its model, such as (x + 1)·127.5 cut off for [−1, 1] (ADM)",
            }.get(dtype.kind, "convert it")
            raise ConfigurationError(f"{where}, {needed}: {cure}")
        if len(shape) != 4 or shape[3] not in (1, 3, 4):
            cure = (
                "transpose it: images.transpose(0, 2, 3, 1)" if len(shape) == 4 and shape[1] in (1, 3) else "reshape it"
            )
            cure = "add the channel: images[..., None]" if len(shape) == 3 else cure
            raise ConfigurationError(f"{where}, {needed}: {cure}")
        if fortran:
            raise ConfigurationError(
                f"{where} in Fortran's order, of which no image can be read alone: save numpy.ascontiguousarray(images)"
            )

    def _labels(self) -> np.ndarray | None:
        """Classes ``(N,)`` int64, where ``arr_1`` is one whole number for each image."""
        with zipfile.ZipFile(self.path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return None
        with self._member("arr_1.npy") as file:
            shape, dtype, _ = self._header(file)
            if shape != self.shape[:1] or dtype.kind not in "iu":
                log.warning(
                    f"{self.path}: arr_1 is {dtype} {shape}, no class for each of {self.shape[0]} images: not used"
                )
                return None
            return np.frombuffer(self._exactly(file, dtype.itemsize * shape[0]), dtype).astype(np.int64)

    def _exactly(self, file: zipfile.ZipExtFile, count: int) -> bytes:
        try:
            data = file.read(count)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ConfigurationError(f"{self.path} is damaged: {error}") from error
        if len(data) < count:
            raise ConfigurationError(f"{self.path} is damaged: {file.name} ends {count - len(data)} bytes too early")
        return data

    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        height, width, channels = self.shape[1:]
        length, place = height * width * channels, 0
        with self._member("arr_0.npy") as file:
            self._header(file)
            for block in blocks:
                for _ in range(place, block.start):  # read all the same: that is what the checksum is of
                    self._exactly(file, length)
                data = np.frombuffer(self._exactly(file, length * len(block)), np.uint8)
                place = block.stop
                yield [
                    _Row(i, f"image {i}", pixels, -1 if self.labels is None else int(self.labels[i]), i)
                    for i, pixels in zip(block, data.reshape(-1, height, width, channels), strict=True)
                ]


class FolderImages(ImageSet):
    """The images in a folder and its folders, in order of their paths.

    Folders are classes where all images lie in one each: by their numbers, where all are named by numbers, else by the order of
    their names. Folders of a thousand files each, by number (``001000/001234.png``), as EDM's generator writes them, are none.
    """

    kind = "image folder"

    def __init__(self, name: str, split: str | None, **options: Any):
        self.path = Path(name).expanduser()
        if split is not None:
            self.path = self.path / split
            if not self.path.is_dir():
                there = ", ".join(sorted(path.name for path in Path(name).expanduser().iterdir() if path.is_dir()))
                raise ConfigurationError(f"{name} has no folder for --split {split}; it has: {there or 'none'}")
        endings = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
        found = (path.relative_to(self.path) for path in self.path.rglob("*") if path.suffix.lower() in endings)
        hidden = re.compile(r"(^|/)\.")
        self.files = sorted((path for path in found if not hidden.search(path.as_posix())), key=lambda path: path.parts)
        if not self.files:
            raise ConfigurationError(f"{self.path} holds no images (.png, .jpg, .webp or another that Pillow reads)")
        self.labels = self._classes(name, split)
        self.labelled = self.labels is not None
        super().__init__(name, len(self.files), **options)
        if options["size"] is None:
            self._check_sizes()

    def _classes(self, name: str, split: str | None) -> list[int] | None:
        folders = sorted({path.parts[0] if len(path.parts) > 1 else "" for path in self.files})
        if split is None and set(folders) <= _SPLITS:
            raise ConfigurationError(f"{name} has a folder for each split, {', '.join(folders)}: name one with --split")
        if "" in folders:
            return None
        if all(folder.isdecimal() for folder in folders):
            stems = [(path.stem, int(path.parts[0])) for path in self.files]
            if all(stem.isdecimal() and int(stem) // 1000 * 1000 == folder for stem, folder in stems):
                return None
            numbers = {folder: int(folder) for folder in folders}
        else:
            numbers = {folder: number for number, folder in enumerate(folders)}
        self.num_classes = max(numbers.values()) + 1
        return [numbers[path.parts[0]] for path in self.files]

    def _check_sizes(self) -> None:
        """From the heads of the files alone, before the work of hours meets the one that differs."""
        for file in self.files:
            try:
                with Image.open(self.path / file) as picture:
                    size = picture.height, picture.width
            except DECODING_ERRORS:
                continue  # counted when it is read
            self._check_shape((self.image_shape[0], *size), str(file))

    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        for block in blocks:
            yield [
                _Row(i, str(self.files[i]), self.path / self.files[i], -1 if self.labels is None else self.labels[i], i)
                for i in block
            ]


def _column(
    names: Sequence[str], fits: Sequence[str], wanted: str | None, usual: Sequence[str], option: str
) -> str | None:
    """The column that was asked for, or that has a usual name, or is the only one that fits.

    Raises:
        ConfigurationError: the one that was asked for is not there or does not fit.
    """
    if wanted is not None:
        if wanted not in fits:
            state = "holds something else" if wanted in names else "is not there"
            raise ConfigurationError(
                f"{option} {wanted!r} {state}; the columns that fit are: {', '.join(fits) or 'none'}"
            )
        return wanted
    named = [name for name in usual if name in fits]
    return named[0] if named else None


class ParquetImages(ImageSet):
    """Images in parquet files, in order of the files' names: encoded, as bytes or as ``datasets`` writes them."""

    kind = "parquet"

    def __init__(
        self, name: str, split: str | None, image_column: str | None, label_column: str | None, **options: Any
    ):
        self.files = self._find(name, split)
        try:
            metadata = [pq.read_metadata(file) for file in self.files]
            schema = pq.read_schema(self.files[0])
        except (OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"{name} cannot be read as parquet: {error}") from error
        images = [field.name for field in schema if self._encoded(field.type)]
        labels = [field.name for field in schema if pa.types.is_integer(field.type)]
        self.image_column = _column(schema.names, images, image_column, _IMAGE_COLUMNS, "--image-column")
        if self.image_column is None:
            if len(images) != 1:
                raise ConfigurationError(
                    f"{name}: which column holds the images is not clear, the columns are: {', '.join(schema.names)}. Name it "
                    "with --image-column"
                )
            (self.image_column,) = images
        self.label_column = _column(schema.names, labels, label_column, _LABEL_COLUMNS, "--label-column")
        self.labelled = self.label_column is not None
        self.groups = [
            (file, group)
            for file, data in zip(self.files, metadata, strict=True)
            for group in range(data.num_row_groups)
        ]
        self.ends = np.cumsum(
            [data.row_group(group).num_rows for data in metadata for group in range(data.num_row_groups)]
        )
        super().__init__(name, int(self.ends[-1]) if len(self.ends) else 0, **options)

    @staticmethod
    def _encoded(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    @staticmethod
    def _find(name: str, split: str | None) -> list[str]:
        path = Path(name).expanduser()
        pattern = str(path).replace("{split}", split or "{split}")
        files = (
            sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else sorted(glob.glob(pattern, recursive=True))
        )
        if not files:
            raise ConfigurationError(f"no files match {pattern}")
        # train-00000-of-00005.parquet is how the hub names the files of a split.
        splits = {
            file: Path(file).name.partition("-")[0] for file in files if re.search(r"-\d+-of-\d+", Path(file).name)
        }
        if "{split}" in name or (split is None and len(set(splits.values())) < 2):
            return files
        if split is None:
            raise ConfigurationError(
                f"{name} has files of several splits, {', '.join(sorted(set(splits.values())))}: name one with --split"
            )
        files = [file for file in files if splits.get(file) == split]
        if not files:
            raise ConfigurationError(f"{name} has no files of --split {split}, such as {split}-00000-of-00001.parquet")
        return files

    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        number, table, group = -1, None, range(0)  # the row group in memory, and its places
        for block in blocks:
            rows, place = [], block.start
            while place < block.stop:
                wanted = int(np.searchsorted(self.ends, place, side="right"))
                if wanted != number:
                    number, table = wanted, self._group(wanted)
                    group = range(int(self.ends[wanted]) - table.num_rows, int(self.ends[wanted]))
                part = range(place, min(block.stop, group.stop))
                for i, row in zip(part, table.slice(place - group.start, len(part)).to_pylist(), strict=True):
                    rows.append(self._row(i, Path(self.groups[number][0]).name, row))
                place = part.stop
            yield rows

    def _group(self, number: int) -> pa.Table:
        file, group = self.groups[number]
        try:
            with pq.ParquetFile(file) as parquet:
                return parquet.read_row_group(group, list(filter(None, (self.image_column, self.label_column))))
        except (OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"{file} is damaged: {error}") from error

    def _row(self, place: int, file: str, row: dict[str, Any]) -> _Row:
        image, label = row[self.image_column], row.get(self.label_column)
        data = image["bytes"] if isinstance(image, dict) else image
        return _Row(place, f"{file}, row {place}", data or b"", -1 if label is None else label, place)


class DatasetImages(ImageSet):
    """The images of a split of a data set of ``datasets``: of the hub, arrow files, or what ``save_to_disk`` wrote."""

    kind = "data set"

    def __init__(
        self,
        name: str,
        split: str | None,
        subset: str | None,
        image_column: str | None,
        label_column: str | None,
        **options: Any,
    ):
        import datasets  # only this kind needs the seconds that it takes to import

        from calib_guidance.data.image_source import ImageSource

        source = ImageSource(name, subset, False, "SAMPLES or SOURCE", "--split")
        self.kind = {"hub": "datasets id", "disk": "datasets folder"}.get(source.kind(), source.kind())
        self.split, self.subset = split or "train", subset
        rows = source.split(self.split)
        features = rows.features
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        images += [
            column
            for column, feature in features.items()
            if getattr(feature, "dtype", "") in ("binary", "large_binary")
        ]
        labels = [column for column, feature in features.items() if "int" in getattr(feature, "dtype", "")]
        image = _column(list(features), images, image_column, [*_IMAGE_COLUMNS, *images], "--image-column")
        if image is None:
            raise ConfigurationError(f"{name} has no column of images; the columns are: {', '.join(features)}")
        label = _column(list(features), labels, label_column, _LABEL_COLUMNS, "--label-column")
        self.label_column, self.image_column, self.labelled = label, image, label is not None
        self.num_classes = getattr(features[label], "num_classes", None) if label else None
        rows = rows.select_columns([image, *([label] if label else [])])
        self.rows = rows.cast_column(image, datasets.Image(decode=False))
        super().__init__(name, len(rows), **options)

    def _read(self, blocks: Iterable[range]) -> Iterator[list[_Row]]:
        for block in blocks:
            columns = self.rows[block.start : block.stop]
            labels = columns[self.label_column] if self.label_column else [None] * len(block)
            yield [
                _Row(i, f"split {self.split!r}, row {i}", self._data(image), -1 if label is None else label, i)
                for i, image, label in zip(block, columns[self.image_column], labels, strict=True)
            ]

    @staticmethod
    def _data(image: dict[str, Any] | None) -> bytes | Path:
        if image is None or image["bytes"] is not None:
            return b"" if image is None else image["bytes"]
        return Path(image["path"]) if os.path.isfile(image["path"] or "") else contents(image)

    def provenance(self) -> dict[str, Any]:
        more = {"split": self.split, "subset": self.subset, "fingerprint": self.rows._fingerprint}
        return super().provenance() | more


def open_images(
    source: str | os.PathLike[str],
    size: int | None = None,
    *,
    resize: str = "adm",
    mode: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_corrupt: float = 0.01,
) -> ImageSet:
    """Images of whatever kind they are.

    Args:
        source: a run folder (``run.json`` in it); an ``.npz`` with ``arr_0``; a folder of images, or of parquet files; a pattern
            of parquet files; a folder that ``save_to_disk`` of datasets wrote, arrow files; or a hub id.
        size: side to which all images are resized and cropped; None takes them as they are.
        resize: how: ``adm`` (what its reference batches are made with) or ``lanczos`` (EDM's), see :data:`RESIZES`.
        mode: ``RGB`` or ``L`` (grey) that all images are converted to.
        split, subset: of data sets and folders that have several; of data sets, ``train`` where it is not named.
        image_column, label_column: of tables, where they are not named as usual (image, label).
        max_corrupt: share of images that may be unreadable, in [0, 1].

    Raises:
        ConfigurationError: nothing there, or something else, or an option without a meaning; more when it is read, see
            :meth:`ImageSet.batches`.
    """
    if resize not in RESIZES:
        raise ConfigurationError(f"--resize: unknown {resize!r}; known: {', '.join(RESIZES)}")
    if mode is not None and mode not in MODES:
        raise ConfigurationError(f"--mode: unknown {mode!r}; known: {', '.join(MODES)}")
    if size is not None and size < 1:
        raise ConfigurationError(f"--size must be 1 or more, got {size}")
    if not 0 <= max_corrupt <= 1:
        raise ConfigurationError(f"--max-corrupt is a share in [0, 1], got {max_corrupt}")
    name, path = str(source), Path(source).expanduser()
    options = {"size": size, "resize": resize, "mode": mode, "max_corrupt": max_corrupt}
    columns = {"image_column": image_column, "label_column": label_column}
    table = path.suffix.lower() == ".parquet"
    if path.is_dir():
        kind, used = _folder_kind(path)
    elif path.suffix.lower() == ".npz":
        kind, used = NpzImages, {}
    elif table:
        kind, used = ParquetImages, {"split", *columns}
    elif path.is_file() and path.suffix.lower() != ".arrow":
        raise ConfigurationError(
            f"{name} is no set of images: those are a run folder, an .npz, a folder of images, parquet or arrow files, or a "
            "hub id"
        )
    else:
        kind, used = DatasetImages, {"split", "subset", *columns}
    given = {"split": split, "subset": subset, **columns}
    if useless := [option for option, value in given.items() if value is not None and option not in used]:
        raise ConfigurationError(
            f"--{useless[0].replace('_', '-')} has no meaning for {name}, which is of the kind {kind.kind}"
        )
    return kind(name, **{option: given[option] for option in given if option in used}, **options)


def _folder_kind(path: Path) -> tuple[type[ImageSet], set[str]]:
    """What reads a folder, and the options that it has.

    Raises:
        ConfigurationError: nothing in it that is known.
    """
    columns = {"image_column", "label_column"}
    if (path / "run.json").is_file():
        return RunImages, set()
    if (path / "samples").is_dir() and (path / "shards").is_dir():
        raise ConfigurationError(
            f"{path} is a run folder without its run.json, which says what made the samples: restore it"
        )
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return DatasetImages, {"split", "subset", *columns}
    for file in path.rglob("*"):
        if file.suffix.lower() == ".parquet":
            return ParquetImages, {"split", *columns}
        if file.suffix.lower() == ".arrow":
            return DatasetImages, {"split", "subset", *columns}
    return FolderImages, {"split"}
