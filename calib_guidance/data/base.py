"""What every source of images offers: encoded images with labels, in a fixed order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from calib_guidance.errors import ConfigurationError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_LISTED = 10


def printable(name: str) -> str:
    """A name in which line breaks and bytes that are not UTF-8 are escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def listed(names: Sequence[str]) -> str:
    """The first names, for messages."""
    return f"{', '.join(map(printable, names[:_LISTED]))}{', …' if len(names) > _LISTED else ''}"


@dataclass(frozen=True)
class SourceOptions:
    """Which images to open.

    ``source`` is a run folder (``run.json`` in it); an ``.npz`` with ``arr_0``; a folder of images, see
    :class:`~calib_guidance.data.source.FolderImages`; a folder or a pattern of parquet or arrow files; a folder that
    ``save_to_disk`` of datasets wrote; or a hub id. Of the columns see :class:`~calib_guidance.data.ImageData`.
    """

    source: str
    split: str | None = None  # such as validation or train[:90%], see positions
    subset: str | None = None  # of a hub id
    image_column: str | None = None
    label_column: str | None = None
    time_column: str | None = None
    index_column: str | None = None
    of_data: bool = False  # of ImageData, whose names of options stand in messages

    @property
    def path(self) -> Path:
        return Path(self.source).expanduser()

    def option(self, name: str) -> str:
        """An option as ``ImageData`` calls it, or ``evaluate`` and ``reference``."""
        if self.of_data:
            return f"data.{'train_split, val_split or test_split' if name == 'split' else name}"
        return "SAMPLES or SOURCE" if name == "source" else f"--{name.replace('_', '-')}"

    def no_split(self, split: str, splits: Iterable[object]) -> ConfigurationError:
        has, option = ", ".join(map(str, splits)) or "none", self.option("split")
        return ConfigurationError(f"{self.source} has no split {split!r}; it has: {has}. Name a split with {option}")

    def several_splits(self, splits: Iterable[str]) -> ConfigurationError:
        names = ", ".join(sorted(splits))
        return ConfigurationError(f"{self.source} has several splits, {names}: name one with {self.option('split')}")


def mixed(count: int, labels: np.ndarray | None) -> np.ndarray:
    """Positions ``(count,)`` in a fixed random order; any stretch of it has the class proportions of the full set.

    The i-th of the n images of a class, in random order, comes at (i + ½)/n of the way.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(count)
    if labels is None:
        return order
    order = order[np.argsort(labels[order], kind="stable")]
    _, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    place = (np.arange(count) - np.repeat(start, size) + 0.5) / np.repeat(size, size)
    return order[np.lexsort((rng.random(count), place))]


def positions(part: str, count: int, labels: np.ndarray | None) -> np.ndarray:
    """Positions of a part such as ``[:90%]`` of ``count`` images, ascending; all of them for an empty one.

    Parts are cut in the order of :func:`mixed`: ``[90%:]`` of a data set that is ordered by class would hold the last ones alone.
    """
    if not part:
        return np.arange(count)
    import datasets

    try:
        (found,) = datasets.ReadInstruction.from_spec(f"all{part}").to_absolute({"all": count})
    except (ValueError, AssertionError) as error:
        message = f"{part!r} is not a part of a split of {count:,} images; expected one such as [:90%] or [1000:]"
        raise ConfigurationError(message) from error
    return np.sort(mixed(count, labels)[found.from_ : found.to])


class Row(NamedTuple):
    """One image, not decoded yet; ``name`` is its file or row of a table, for messages."""

    name: str
    image: bytes | Path | str | np.ndarray  # encoded, its file, a URL, or pixels (H, W, C)
    label: int = -1  # unknown
    index: int | None = None  # that the image keeps in every order
    time: int | None = None  # diffusion step t of a denoised image


class ImageSource(ABC):
    """Images in a fixed order, read in blocks; ``num_images`` counts corrupt ones, None where a stream does not state it."""

    kind: str  # for messages and provenance
    labelled = False  # whether the images have class numbers
    why_unlabelled = ""  # why not, for messages
    class_names: list[str] | None = None  # of each class number; None where classes have no names

    def __init__(self, name: str, num_images: int | None, split: str | None = None):
        self.name, self.num_images, self.split = name, num_images, split
        self.where = name if split is None else f"{name}, split {split!r}"
        if num_images == 0:
            raise ConfigurationError(f"no images found in {self.where}")

    @abstractmethod
    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        """The rows of each block of positions. Blocks ascend and do not overlap."""

    def provenance(self) -> dict[str, Any]:
        """What identifies the images beyond name and kind, as JSON."""
        return {}

    def summary(self) -> str:
        """``N images, K classes: a, b, c, …``."""
        count = "a stream of images" if self.num_images is None else f"{self.num_images:,} images"
        if self.class_names is None:
            return f"{self.where}: {count}, {'classes without names' if self.labelled else 'no classes'}"
        return f"{self.where}: {count}, {len(self.class_names):,} classes: {listed(self.class_names)}"


class IndexedSource(ImageSource):
    """Images that can be read in any order."""

    num_images: int

    @abstractmethod
    def __getitem__(self, position: int) -> Row: ...

    @abstractmethod
    def column(self, name: str) -> np.ndarray | None:
        """``label`` or ``index`` of every image, int64 ``(N,)``; None where there is none."""

    def mixed(self) -> np.ndarray:
        """All positions in the order of :func:`mixed`."""
        return mixed(self.num_images, self.column("label"))

    def warn_of_empty_classes(self) -> None:
        names = self.class_names or ()
        if len(empty := np.setdiff1d(np.arange(len(names)), self.column("label") if names else ())):
            empty = [names[number] for number in empty]
            log.warning(f"{self.where}: {len(empty)} classes without images keep their numbers: {listed(empty)}")

    def stream(self, num_shards: int) -> datasets.IterableDataset:
        """Items for :meth:`row` in :meth:`mixed` order, as shuffled blocks of a folder in its order would not mix classes."""
        import datasets

        numbered = datasets.Dataset.from_dict({"position": self.mixed()})
        return numbered.to_iterable_dataset(num_shards=min(self.num_images, num_shards))

    def row(self, values: Mapping[str, Any]) -> Row:
        """The row of an item of :meth:`stream`."""
        return self[values["position"]]

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        for block in blocks:
            yield [self[position] for position in block]
