"""Opens whatever holds images: a run folder, an ``.npz``, a folder, parquet or arrow files, or a data set of the hub."""

from __future__ import annotations

import contextlib
import glob
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from calib_guidance.data.base import ImageSource, IndexedSource, Row, SourceOptions, listed, positions, printable
from calib_guidance.errors import ConfigurationError, closest, first_line
from calib_guidance.runs import CorruptedShardError, RunFolder, read_run
from calib_guidance.runs.store import label_names

log = logging.getLogger(__name__)

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_OPTIONS = ("split", "subset", "image_column", "label_column", "time_column", "index_column")
_IMAGES = frozenset(ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN)
_VALIDATION = ("validation", "val", "valid")
_MOST_CLASSES = 1_000_000
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def source_kind(options: SourceOptions) -> str:
    """``run folder``, ``npz``, ``image folder``, ``parquet``, ``arrow``, ``disk`` (of ``save_to_disk``) or ``hub``.

    A folder is of the kind of the first folder in it, from the top, that holds tables or images.
    """
    path, ending = options.path, options.path.suffix.lower()
    if path.is_dir():
        return _folder_kind(path)
    if ending in _TABLES:
        return _TABLES[ending]
    if ending == ".npz":
        return "npz"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", options.source) or path.exists():
        raise ConfigurationError(
            f"{options.option('source')}: {options.source} is neither a folder, nor a pattern of .parquet or .arrow files, nor "
            "an .npz file, nor a hub id such as ILSVRC/imagenet-1k"
        )
    if path.parent != Path() and path.parent.is_dir():
        # A missing folder beside runs or folders of like names is misspelled, and nothing to ask the hub for.
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
        near = closest(path.name, folders)
        if near or any((path.parent / name / "run.json").exists() for name in folders):
            raise ConfigurationError(f"{options.option('source')}: there is no {path.name} in {path.parent}{near}")
    return "hub"


def _folder_kind(path: Path) -> str:
    if (path / "run.json").is_file():
        return "run folder"
    if (path / "samples").is_dir() and (path / "shards").is_dir():
        raise ConfigurationError(f"{path} is a run folder without its run.json, which says what made it: restore it")
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "disk"
    folders = [path]
    for folder in folders:
        entries = sorted(folder.iterdir())
        endings = {entry.suffix.lower() for entry in entries if not entry.name.startswith(".")}
        for ending, kind in _TABLES.items():
            if ending in endings:
                return kind
        if endings & _IMAGES:
            return "image folder"
        folders += [entry for entry in entries if entry.is_dir() and not _is_loop(entry)]
    raise ConfigurationError(f"no images found in {path}: no .parquet, .arrow, .png, .jpg, .webp or other images")


def open_source(options: SourceOptions, access: str = "ordered") -> ImageSource:
    """Images for ``ordered`` access by ``read``, ``random`` access, or as a ``stream`` without a copy in the cache."""
    from calib_guidance.data.tables import open_table  # imports datasets

    kind, source = source_kind(options), options.source
    if kind == "run folder" and access != "ordered":
        options, kind = replace(options, source=f"{glob.escape(options.source)}/samples/*.parquet"), "parquet"
    if kind == "npz" and access != "ordered":
        option = options.option("source")
        raise ConfigurationError(f"{option}: {source} is an .npz, which is only read in order: save it as a folder")
    allowed = {"run folder": (), "npz": (), "image folder": ("split",), "hub": _OPTIONS}
    for name in _OPTIONS:
        if getattr(options, name) is not None and name not in allowed.get(kind, {*_OPTIONS} - {"subset"}):
            option = options.option(name)
            raise ConfigurationError(f"{option} has no meaning for {options.source}, which is of the kind {kind}")
    if kind in ("run folder", "npz"):
        return (RunImages if kind == "run folder" else NpzImages)(source)
    if kind == "image folder":
        return FolderImages(options)
    # Reading in order needs no copy of parquet files in the cache of datasets.
    streaming = access == "stream" or (access == "ordered" and kind == "parquet" and "[" not in (options.split or ""))
    return open_table(kind, options, streaming)


class FolderImages(IndexedSource):
    """The images below a folder, in order of their paths; a split is a folder in it, or a part such as ``train[:90%]``.

    The class of an image is the first folder below the split, however deep the image lies in it. Folders that are all named by
    decimal numbers have these class numbers, others are numbered in order of their names. A class without images keeps its
    number, and a warning names it. Images that lie beside class folders leave all images without labels, and are named. A
    dangling link to an image counts as a corrupt image. Hidden files and folders are ignored, links to folders are followed.

    Folders of a thousand files each, by number (``001000/001234.png``), as EDM's generator writes them, are not classes.
    """

    kind = "image folder"

    def __init__(self, options: SourceOptions):
        split, bracket, part = (options.split or "").partition("[")
        names = (split, *(_VALIDATION if split in _VALIDATION else ()))
        self.root = next((path for name in names if (path := options.path / name).is_dir()), options.path).absolute()
        if split and self.root == options.path.absolute():
            raise options.no_split(split, sorted(path.name for path in options.path.iterdir() if path.is_dir()))
        files, folders, dangling = _scan(self.root)
        first = {parts[0] for parts in files}
        if not split and files and first <= {"train", "test", *_VALIDATION}:
            raise options.several_splits(first)
        if dangling:
            log.warning(f"{self.root}: dangling links: {len(dangling)} ({listed(dangling)})")
        labels = self._classes(files, folders)
        rows = positions(bracket + part, len(files), labels)
        # Both in one buffer each, which processes that load images share instead of copying.
        self.files = pa.array([os.fsencode("/".join(files[i])) for i in rows], pa.large_binary())
        self.labels = None if labels is None else labels[rows]
        self.labelled = labels is not None
        super().__init__(options.source, len(self.files), options.split)
        self.warn_of_empty_classes()

    def _classes(self, files: list[tuple[str, ...]], folders: list[str]) -> np.ndarray | None:
        """Class number of each image; sets names, or why there are none."""
        strays, cure = [parts[0] for parts in files if len(parts) == 1], ""
        stems = [(parts[0], os.path.splitext(parts[-1])[0]) for parts in files]
        decimal = all(folder.isdecimal() for folder in folders)
        numbers = {folder: int(folder) if decimal else number for number, folder in enumerate(folders)}
        if len(strays) == len(files):
            self.why_unlabelled = "the images are not in folders, one for each class"
        elif strays:
            self.why_unlabelled = f"images beside the class folders: {len(strays)} ({listed(strays)})"
            cure = "Images have no labels: move these into a class, or remove them"
        elif all(len(a) == 6 and f"{a}{b}".isdecimal() and int(b) // 1000 * 1000 == int(a) for a, b in stems):
            self.why_unlabelled = "its folders number files by the thousand, as EDM's generator writes them"
        elif decimal and (len({*numbers.values()}) < len(folders) or max(numbers.values()) >= _MOST_CLASSES):
            self.why_unlabelled = f"its folders are not numbers of classes: {listed(folders)}"
            cure = f"They have to differ and be below {_MOST_CLASSES:,}"
        else:
            self.class_names = [str(number) for number in range(max(numbers.values()) + 1)] if decimal else folders
            return np.array([numbers[parts[0]] for parts in files], np.int64)
        if cure:
            log.warning(f"{self.root}: {self.why_unlabelled}. {cure}")
        return None

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
        inner[:] = [name for name in inner if not name.startswith(".") and not _is_loop(here / name)]
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in _IMAGES:
                files.append((*parts, name))
            elif not here.joinpath(name).suffix and os.path.islink(here / name) and not os.path.exists(here / name):
                dangling.append("/".join((*parts, name)))
        if not parts:
            folders = inner + dangling  # a class folder that dangles is an empty class
    return sorted(files), sorted(folders), sorted(dangling)


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to a folder that it lies in."""
    return folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents)


class NpzImages(ImageSource):
    """``arr_0``, uint8 ``(N, H, W, C)``, and, where it is there, ``arr_1`` ``(N,)``, their classes: what ADM's sampling writes.

    Read from beginning to end, a block at a time, compressed or not; checksums are compared.
    """

    kind = "npz"

    def __init__(self, name: str):
        self.path, self.labels = Path(name).expanduser(), None
        with self._array("arr_0") as (file, self.shape, dtype, fortran, size):
            self._check_images(dtype, fortran)
            if size != (said := math.prod(self.shape)):
                message = f"{self.path}: arr_0 says it holds {said} bytes, and holds {size}"
                raise ConfigurationError(f"{message}. Write it with numpy.savez")
        if "arr_1" in self.names:
            with self._array("arr_1") as (file, shape, dtype, *_):
                if shape == self.shape[:1] and dtype.kind in "iu":  # classes (N,)
                    self.labels = np.frombuffer(_exactly(file, dtype.itemsize * shape[0]), dtype).astype(np.int64)
                else:
                    message = f"arr_1 is {dtype} {shape}, no class for each of {self.shape[0]} images: not used"
                    log.warning(f"{self.path}: {message}")
        self.labelled = self.labels is not None
        super().__init__(name, self.shape[0])

    @contextlib.contextmanager
    def _array(self, name: str) -> Iterator[tuple[Any, ...]]:
        """An array's bytes, its shape and type, whether it is in Fortran order, and the number of bytes that are there."""
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            if name not in self.names:
                raise ConfigurationError(
                    f"{self.path} has no {name}, it has: {', '.join(self.names)}. Images are arr_0, uint8 (N, H, W, C), as "
                    "numpy.savez(file, images, labels) names them"
                )
            try:
                with archive.open(f"{name}.npy") as file:
                    header = self._header(file)
                    yield file, *header, archive.getinfo(file.name).file_size - file.tell()
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
                raise ConfigurationError(f"{self.path} is damaged: {error}. Copy or download it again") from error

    def _header(self, file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], np.dtype, bool]:
        try:
            shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            if any(size < 0 for size in shape) or 0 in shape[1:]:
                raise ValueError(f"its shape is {shape}")
        except (zipfile.BadZipFile, zlib.error):
            raise
        except Exception as error:  # numpy has the header parsed as Python, which fails in many ways
            message = f"{self.path}: {file.name} is not a numpy array: {first_line(error)}"
            raise ConfigurationError(f"{message}. Write it with numpy.savez") from error
        return shape, dtype, fortran

    def _check_images(self, dtype: np.dtype, fortran: bool) -> None:
        shape = self.shape
        if dtype != np.uint8:
            cure = {
                "O": "pickled objects are not loaded",
                "f": "convert it to 8 bits by the rule of its model, such as (x + 1)·127.5 clipped for [−1, 1] (ADM)",
            }.get(dtype.kind, "convert it")
        elif len(shape) == 3:
            cure = "add the channel: images[..., None]"
        elif len(shape) != 4 or shape[3] not in (1, 3, 4):
            cure = "transpose it: images.transpose(0, 2, 3, 1)" if shape[1:2] in ((1,), (3,)) else "reshape it"
        elif fortran:
            cure = "of Fortran order images cannot be read one by one: save numpy.ascontiguousarray(images)"
        else:
            return
        kinds = f"{dtype} {shape}, images are uint8 (N, H, W, C) with C = 1 or 3"
        raise ConfigurationError(f"{self.path}: arr_0 is {kinds}: {cure}")

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        labels = np.full(self.num_images, -1) if self.labels is None else self.labels
        length, place = math.prod(self.shape[1:]), 0
        with self._array("arr_0") as (file, *_):
            for block in blocks:
                for _ in range(place, block.start):  # read too: the checksum covers it
                    _exactly(file, length)
                data = np.frombuffer(_exactly(file, length * len(block)), np.uint8).reshape(-1, *self.shape[1:])
                place = block.stop
                yield [Row(f"image {i}", x, int(labels[i])) for i, x in zip(block, data, strict=True)]


def _exactly(file: zipfile.ZipExtFile, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError(f"{file.name} ends {count - len(data)} bytes too early")
    return data


class RunImages(ImageSource):
    """The samples of a run folder, ``run``, each shard checked against its record."""

    kind = "run folder"
    labelled = True

    def __init__(self, name: str):
        self.run = RunFolder.open(name)
        done, lack = self.run.done()
        if lack:
            raise ConfigurationError(f"{name} {lack}")
        records = [self.run.record(shard) for shard in done]
        self.failed = sum(len(record["failed"]) for record in records)
        self.ends = np.cumsum([record["rows"] for record in records])
        self.class_names = label_names(pq.read_schema(self.run.file(done[0], "parquet")))
        super().__init__(name, int(self.ends[-1]))

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        number, first, rows = -1, 0, []  # of the shard in memory
        for block in blocks:
            found = []
            for position in block:
                wanted = int(np.searchsorted(self.ends, position, side="right"))
                if wanted != number:
                    number, first, rows = wanted, int(self.ends[wanted - 1]) if wanted else 0, self._shard(wanted)
                found.append(rows[position - first])
            yield found

    def _shard(self, number: int) -> list[Row]:
        try:
            data = self.run.read_bytes(self.run.shards()[number])
        except CorruptedShardError as error:
            raise ConfigurationError(f"{self.name}: {error}. Re-run predict to regenerate the shard") from error
        samples = pq.read_table(pa.BufferReader(data)).to_pylist()
        if len(samples) != np.diff(self.ends, prepend=0)[number]:
            raise ConfigurationError(f"{self.name} changed while it was read: re-run the command")
        return [Row(f"sample {row['index']}", row["image"]["bytes"], row["label"], row["index"]) for row in samples]

    def provenance(self) -> dict[str, Any]:
        rule = read_run(self.run.path)["identity"].get("uint8_rule")
        shards = self.run.samples_sha256()
        return {"run": self.run.fingerprint, "shards_sha256": shards, "uint8_rule": rule, "failed": self.failed}
