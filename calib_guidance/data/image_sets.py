"""Images for evaluation: 8-bit batches in a fixed order, shared by processes, with a record of what was done to them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from calib_guidance.backend.choices import MODES, RESIZES
from calib_guidance.backend.distributed import DistributedContext, available_cores
from calib_guidance.data import preprocess
from calib_guidance.data.base import ImageSource, Row, SourceOptions
from calib_guidance.data.loading import SkippedImages
from calib_guidance.data.preprocess import UnreadableImageError
from calib_guidance.data.source import FolderImages, open_source
from calib_guidance.errors import ConfigurationError, check_choice

_NAMED = 10  # skipped images in a provenance


class ImageBatch(NamedTuple):
    """Images of a set, on the CPU.

    Examples:
        >>> batch = ImageBatch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([4, -1]), torch.arange(2))
        >>> batch.label.tolist()  # the second is not known
        [4, -1]
    """

    image: Tensor  # uint8 (N, C, H, W), C = 1 or 3
    label: Tensor  # int64 (N,), −1 where unknown
    index: Tensor  # int64 (N,), the place in the set's order; of a run, the sample's number


class _Decoded(NamedTuple):
    position: int
    row: Row
    pixels: np.ndarray | None  # (C, H, W)
    digest: bytes
    conversions: int
    problem: str  # with the name, where there are no pixels


class ImageSet:
    """The images of a source in a fixed order, at one size and in one mode, to measure them.

    Images that cannot be read are skipped, named and counted. ``image_shape`` is ``(C, H, W)`` of every image.

    Args:
        source, options: as of :class:`~calib_guidance.data.base.SourceOptions`, or an ImageSource without options.
        size: side to which all images are resized and cropped; None takes them as they are.
        resize: one of :data:`~calib_guidance.backend.choices.RESIZES`.
        mode: ``RGB`` or ``L`` (gray) that all images are converted to.
        max_corrupt: fraction of images that may be unreadable, in [0, 1].

    Examples:
        >>> np.savez("images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
        >>> images = ImageSet("images.npz")
        >>> images.num_images, images.image_shape
        (2, (3, 8, 8))
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | ImageSource,
        size: int | None = None,
        *,
        resize: str = "adm",
        mode: str | None = None,
        max_corrupt: float = 0.01,
        **options: str | None,
    ):
        check_choice("--resize", resize, RESIZES)
        check_choice("--mode", mode or "RGB", MODES)
        if size is not None and size < 1:
            raise ConfigurationError(f"--size must be 1 or more, got {size}")
        opened = source if isinstance(source, ImageSource) else None
        self._corrupt = SkippedImages(opened.name if opened else str(source), max_corrupt, "--max-corrupt")
        self.source = opened or open_source(SourceOptions(str(source), **options))
        self.name, self.num_images, self.labelled = self.source.name, self.source.num_images, self.source.labelled
        self.size, self.resize, self.mode = size, resize, mode
        self._problems: dict[int, str] = {}
        # By position: an image that is read twice, or by any process, counts once.
        self._digests = np.zeros((self.num_images, 32), np.uint8)
        self._done = np.zeros(self.num_images, np.int32)
        reasons = []
        for position, row in self._one_by_one(self.num_images):
            first = self._decode(position, row)
            if first.pixels is not None:
                break
            reasons.append(first.problem)
            self._corrupt.count(reasons[-1:], self.num_images, self.source)
        else:
            raise ConfigurationError(f"{self.name}: no image can be read: {', '.join(reasons[:_NAMED])}")
        self.image_shape: tuple[int, int, int] = first.pixels.shape
        self._first = first.row.name
        if size is None and isinstance(self.source, FolderImages):
            # The heads of all files, which finds a different size before hours of work.
            for _, row in self._one_by_one(self.num_images):
                with contextlib.suppress(UnreadableImageError):  # counted when it is read
                    self._check_shape((self.image_shape[0], *preprocess.image_size(row)), row.name)

    def _one_by_one(self, count: int) -> Iterator[tuple[int, Row]]:
        """The first rows, by position."""
        return enumerate(row for (row,) in self.source.read(range(i, i + 1) for i in range(count)))

    def _decode(self, position: int, row: Row) -> _Decoded:
        try:
            picture, done = preprocess.decode(preprocess.contents(row), self.mode)
        except UnreadableImageError as error:
            return _Decoded(position, row, None, b"", 0, f"{row.name} ({error})")
        if self.size is not None:
            picture, enlarged = preprocess.crop(picture, self.size, self.resize)
            done |= enlarged
        pixels = np.asarray(picture)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes() + pixels.tobytes()).digest()
        return _Decoded(position, row, pixels, digest, done, "")

    def _check_shape(self, shape: tuple[int, ...], name: str) -> None:
        if shape == self.image_shape:
            return
        (channels, *size), (first_channels, *first_size) = shape, self.image_shape
        if size != first_size:
            raise ConfigurationError(
                f"{self.name} has images of several sizes (height×width): {'×'.join(map(str, first_size))} (first {self._first}) "
                f"and {'×'.join(map(str, size))} (first {name}). --size N resizes and crops all of them to N×N, as --resize says"
            )
        gray, color = (name, self._first) if channels < first_channels else (self._first, name)
        raise ConfigurationError(
            f"{self.name} has gray images (first {gray}) and color images (first {color}). --mode RGB converts gray ones to RGB, "
            "as ADM and torch-fidelity do; --mode L converts all to gray"
        )

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """The batches of one process, in order: those b with b mod ``world_size`` = ``rank``, from b · ``batch_size`` on."""
        starts = range(rank * batch_size, self.num_images, world_size * batch_size)
        blocks = [range(start, min(start + batch_size, self.num_images)) for start in starts]
        # Decoders release Python's lock. One batch is read ahead while the last one is used.
        with ThreadPoolExecutor(available_cores()) as pool:
            rows = zip(blocks, self.source.read(blocks), strict=True)
            work = ([pool.submit(self._decode, i, row) for i, row in zip(*pair, strict=True)] for pair in rows)
            current: list[Future[_Decoded]] = []
            for following in itertools.chain(work, [[]]):
                if good := self._recorded([future.result() for future in current]):
                    yield ImageBatch(
                        torch.from_numpy(np.stack([item.pixels for item in good])),
                        torch.tensor([item.row.label for item in good]),
                        torch.tensor([item.position if item.row.index is None else item.row.index for item in good]),
                    )
                current = following

    def _recorded(self, decoded: Sequence[_Decoded]) -> list[_Decoded]:
        """Those that can be read; records all of them."""
        bad = {item.position: item.problem for item in decoded if item.pixels is None}
        self._problems |= bad
        self._corrupt.count(bad.values(), self.num_images, self.source)
        good = [item for item in decoded if item.pixels is not None]
        for item in good:
            self._check_shape(item.pixels.shape, item.row.name)
            self._digests[item.position] = np.frombuffer(item.digest, np.uint8)
            self._done[item.position] = item.conversions
        return good

    def examples(self, labels: Collection[int], count: int, among: int = 20_000) -> dict[int, list[np.ndarray]]:
        """The first ``count`` images ``(C, H, W)`` of each class among the first images of the set, for people."""
        found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
        for position, row in self._one_by_one(min(self.num_images, among)):
            images = found.get(row.label)
            if images is not None and len(images) < count:
                if (pixels := self._decode(position, row).pixels) is not None:
                    images.append(pixels)
                if all(len(each) == count for each in found.values()):
                    break
        return found

    def gather(self, processes: DistributedContext) -> None:
        """Exchange what the processes found in their batches. Each process calls it after its last batch."""
        positions = np.flatnonzero(self._digests.any(1))
        everyone = processes.gather_rows(torch.from_numpy(positions)).numpy()
        self._digests[everyone] = processes.gather_rows(torch.from_numpy(self._digests[positions])).numpy()
        self._done[everyone] = processes.gather_rows(torch.from_numpy(self._done[positions])).numpy()
        for problems in processes.gather(self._problems):
            self._problems |= problems
        if not processes.is_first:  # the first one warns of them
            self._corrupt.names.update(self.skipped)
        self._corrupt.count(self.skipped, self.num_images)

    @property
    def skipped(self) -> list[str]:
        """``file or row (reason)`` of the images that could not be read so far, in order."""
        return [self._problems[position] for position in sorted(self._problems)]

    @property
    def sha256(self) -> str | None:
        """Of the images as measured, in any order and kind of file; None until all have been read, see :meth:`gather`."""
        seen = self._digests.any(1)
        if seen.sum() + len(self._problems) < self.num_images:
            return None
        return hashlib.sha256(b"".join(sorted(map(bytes, self._digests[seen])))).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What the images are and what was done to them, as JSON; complete when all have been read."""
        counts = {name: int(((self._done >> bit) & 1).sum()) for bit, name in enumerate(preprocess.CONVERSIONS)}
        return {
            "source": self.name,
            "kind": self.source.kind,
            "num_images": self.num_images,
            "num_skipped": len(self._problems),
            "skipped": self.skipped[:_NAMED],
            "image_shape": list(self.image_shape),
            "sha256": self.sha256,
            "preprocessing": None if self.size is None else {"size": self.size, "how": RESIZES[self.resize]},
            "mode": self.mode,
            "decoder": f"Pillow {PIL.__version__}",
            "conversions": {name: count for name, count in counts.items() if count},
            "labelled": self.labelled,
            **self.source.provenance(),
        }

    @property
    def notes(self) -> list[str]:
        """What the metrics depend on, a sentence each."""
        conversions = self.provenance()["conversions"]
        notes = [f"{count} of {self.num_images} images: {name}" for name, count in conversions.items()]
        if self._problems:
            notes.append(f"{len(self._problems)} of {self.num_images} images were skipped: {self.skipped[0]} …")
        return notes
