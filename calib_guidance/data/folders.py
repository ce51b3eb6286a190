"""Folders of images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from calib_guidance.data.base import IndexedSource, Row, SourceOptions, listed, positions, printable

log = logging.getLogger(__name__)

_VALIDATION = ("validation", "val", "valid")
_SPLITS = {"train", "test", *_VALIDATION}
_MOST_CLASSES = 1_000_000
IMAGE_ENDINGS = frozenset(ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN)


class FolderImages(IndexedSource):
    """The images below a folder, in order of their paths.

    The class of an image is the first folder below the split, however deep the image lies in it. Folders that are all named by
    decimal numbers have these class numbers, others are numbered in order of their names. A class without images keeps its
    number, and a warning names it. Images that lie beside class folders leave all images without labels, and are named. A
    dangling link to an image counts as a corrupt image. Hidden files and folders are ignored, links to folders are followed.

    Folders of a thousand files each, by number (``001000/001234.png``), as EDM's generator writes them, are not classes.

    Args:
        options: of the source. A split is a folder in it, or a part of one such as ``train[:90%]``.
    """

    kind = "image folder"

    def __init__(self, options: SourceOptions):
        split, bracket, part = (options.split or "").partition("[")
        self.root = (self._split_folder(options, split) if split else options.path).absolute()
        files, folders, dangling = _scan(self.root)
        first = {parts[0] for parts in files}
        if not split and files and first <= _SPLITS:
            raise options.several_splits(first)
        if dangling:
            log.warning(f"{self.root}: dangling links: {len(dangling)} ({listed(dangling)})")
        labels = self._classes(files, folders)
        labels = None if labels is None else np.array(labels, np.int64)
        rows = positions(bracket + part, len(files), labels)
        # Both in one buffer each, which processes that load images share instead of copying.
        self.files = pa.array([os.fsencode("/".join(files[i])) for i in rows], pa.large_binary())
        self.labels = None if labels is None else labels[rows]
        self.labelled = labels is not None
        super().__init__(options.source, len(self.files), options.split)
        self.warn_of_empty_classes()

    @staticmethod
    def _split_folder(options: SourceOptions, split: str) -> Path:
        for name in (split, *(_VALIDATION if split in _VALIDATION else ())):
            if (options.path / name).is_dir():
                return options.path / name
        raise options.no_split(split, sorted(path.name for path in options.path.iterdir() if path.is_dir()))

    def _classes(self, files: list[tuple[str, ...]], folders: list[str]) -> list[int] | None:
        """Class number of each image; sets names, or why there are none."""
        strays = [parts[0] for parts in files if len(parts) == 1]
        if len(strays) == len(files):
            return self._unlabelled("the images are not in folders, one for each class")
        if strays:
            why = f"images beside the class folders: {len(strays)} ({listed(strays)})"
            return self._unlabelled(why, "Images have no labels: move these into a class, or remove them")
        if _counts_files(files):
            return self._unlabelled("its folders number files by the thousand, as EDM's generator writes them")
        numbers = {folder: number for number, folder in enumerate(folders)}
        if all(folder.isdecimal() for folder in folders):
            numbers = {folder: int(folder) for folder in folders}
            if len({*numbers.values()}) < len(folders) or max(numbers.values()) >= _MOST_CLASSES:
                why = f"its folders are not numbers of classes: {listed(folders)}"
                return self._unlabelled(why, f"They have to differ and be below {_MOST_CLASSES:,}")
            folders = [str(number) for number in range(max(numbers.values()) + 1)]
        self.class_names = folders
        return [numbers[parts[0]] for parts in files]

    def _unlabelled(self, why: str, cure: str = "") -> None:
        self.why_unlabelled = why
        if cure:
            log.warning(f"{self.root}: {why}. {cure}")

    def __getitem__(self, position: int) -> Row:
        name = os.fsdecode(self.files[position].as_py())
        label = -1 if self.labels is None else int(self.labels[position])
        return Row(printable(name), self.root / name, label)

    def column(self, name: str) -> np.ndarray | None:
        return self.labels if name == "label" else None


def _scan(root: Path) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """Images below a folder as parts of their paths, in order; the folders in it; and dangling links to other things."""
    files, folders, dangling = [], [], []
    for where, inner, names in os.walk(root, followlinks=True):
        here = Path(where)
        parts = here.relative_to(root).parts
        inner[:] = [name for name in inner if not name.startswith(".") and not is_loop(here / name)]
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
                files.append((*parts, name))
            elif not here.joinpath(name).suffix and os.path.islink(here / name) and not os.path.exists(here / name):
                dangling.append("/".join((*parts, name)))
        if not parts:
            folders = inner + dangling  # a class folder that dangles is an empty class
    return sorted(files), sorted(folders), sorted(dangling)


def is_loop(folder: Path) -> bool:
    """Whether a folder is a link to a folder that it lies in."""
    return folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents)


def _counts_files(files: list[tuple[str, ...]]) -> bool:
    stems = [(parts[0], os.path.splitext(parts[-1])[0]) for parts in files]
    return all(len(a) == 6 and f"{a}{b}".isdecimal() and int(b) // 1000 * 1000 == int(a) for a, b in stems)
