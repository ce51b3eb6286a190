"""Tables of images: parquet and arrow files, folders that ``save_to_disk`` of datasets wrote, and data sets of the hub."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub.errors import GatedRepoError

from calib_guidance.data.base import ImageSource, IndexedSource, Row, SourceOptions, positions
from calib_guidance.errors import ConfigurationError, first_line

READING_ERRORS = (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError)
# Usual names of columns, tried in order.
_USUAL = {"image": ("image", "img", "png", "jpg"), "label": ("label", "labels", "fine_label", "class")}


def open_table(kind: str, options: SourceOptions, streaming: bool) -> DatasetImages | StreamedImages:
    """One split of a table; the only one, or ``train``, where none is named.

    ``streaming`` makes no copy in the cache, and knows no parts such as ``train[:90%]``; what ``save_to_disk`` wrote needs none.
    """
    split, bracket, part = (options.split or "").partition("[")
    count, files = None, []
    if kind in ("parquet", "arrow"):
        split, files = _files(kind, options, split)
    try:
        if kind == "disk":
            loaded = datasets.load_from_disk(str(options.path))
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        elif kind == "hub":
            splits = datasets.load_dataset(path=options.source, name=options.subset, streaming=streaming)
        else:
            if kind == "parquet":
                count = _num_rows(files)
            splits = datasets.load_dataset(path=kind, data_files={split: files}, streaming=streaming)
    except ConfigurationError:
        raise
    except Exception as error:  # libraries fail in as many ways as there are formats and connections
        raise _unreadable(kind, options, error) from error
    split = split or "train"
    rows = splits.get(split)
    if rows is None or (part and isinstance(rows, datasets.IterableDataset)):
        raise options.no_split(f"{split}{bracket}{part}", splits)
    if isinstance(rows, datasets.Dataset):
        return DatasetImages(kind, options, f"{split}{bracket}{part}", rows, bracket + part)
    if count is None:
        count = getattr((rows.info.splits or {}).get(split), "num_examples", None)
    return StreamedImages(kind, options, split, rows, count)


def _num_rows(files: Sequence[str]) -> int:
    """Rows of parquet files, which have to have the same columns."""
    heads = [pq.read_metadata(file) for file in files]
    first, *others = ([*head.schema.to_arrow_schema().names] for head in heads)
    for file, columns in zip(files[1:], others, strict=True):
        if sorted(columns) != sorted(first):
            raise ConfigurationError(
                f"{file} has other columns ({', '.join(columns)}) than {files[0]} ({', '.join(first)}): name files of one "
                "data set"
            )
    return sum(head.num_rows for head in heads)


def _files(kind: str, options: SourceOptions, split: str) -> tuple[str, list[str]]:
    """The split and its files, in order of their names.

    Files of a folder have the names that datasets looks for (``train-*.parquet``, ``train/*.parquet``). A pattern without
    ``{split}`` holds one split, ``train``, unless files are named as the hub does (``test-00000-of-00005.parquet``).
    """
    splits: dict[str, list[str]] = {}
    if options.path.is_dir():
        patterns = get_data_patterns(str(options.path))
        found = DataFilesDict.from_patterns(patterns, str(options.path), allowed_extensions=[f".{kind}"])
        splits = {str(name): sorted(files) for name, files in found.items() if files}
    else:
        pattern = str(options.path).replace("{split}", split or "{split}")
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise ConfigurationError(f"{options.option('source')}: no files match {pattern}")
        if "{split}" in options.source:
            return split, files
        for file in files:
            named = re.fullmatch(r"(.+)-\d+-of-\d+\.\w+", Path(file).name)
            splits.setdefault(named[1] if named else "train", []).append(file)
        if len(splits) == 1:
            splits.setdefault("train", files)
            split = split or "train"
    if not split and len(splits) > 1:
        raise options.several_splits(splits)
    split = split or next(iter(splits))
    if split not in splits:
        raise options.no_split(split, splits)
    return split, splits[split]


def _unreadable(kind: str, options: SourceOptions, error: Exception) -> ConfigurationError:
    source, option, why = options.source, options.option, first_line(error.__cause__ or error)
    page = f"https://huggingface.co/datasets/{source}"
    if kind != "hub":
        form = "what save_to_disk of datasets writes" if kind == "disk" else kind
        return ConfigurationError(f"{source} cannot be read as {form}: {why}. Copy or write it again")
    if isinstance(error, GatedRepoError) or "gated" in str(error):
        return ConfigurationError(
            f"the hub data set {source} needs a login: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN to a "
            "token of that account"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return ConfigurationError(
            f"{option('source')}: {source} is neither a path here nor a data set on the hub that this account may read. If "
            f"{page} is private, run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, ValueError):
        return ConfigurationError(f"{option('subset')}: {' '.join(str(error).split())}")
    return ConfigurationError(
        f"the hub data set {source} cannot be reached ({why}), and there is no path of that name here. Without a network, name a "
        f"local copy with {option('source')}"
    )


def _find_columns(features: Mapping[str, Any], where: str, options: SourceOptions) -> dict[str, str]:
    """The columns of ``image`` (encoded), ``label``, ``time`` and ``index`` (integers), as far as there are any."""
    columns, kinds = {}, {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    images = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, Mapping) and "bytes" in feature)
        or kinds[name] in ("binary", "large_binary")
    ]
    integers = [name for name, kind in kinds.items() if "int" in kind]
    for use in ("image", "label", "time", "index"):
        wanted, fits = getattr(options, f"{use}_column"), images if use == "image" else integers
        if wanted is not None and wanted not in fits:
            state = f"holds {features[wanted]}" if wanted in features else "is not there"
            raise ConfigurationError(
                f"{where}: {options.option(f'{use}_column')} {wanted!r} {state}; the columns that fit are: "
                f"{', '.join(fits) or 'none'}"
            )
        usual = [name for name in _USUAL.get(use, ()) if name in fits]
        if use == "image" and not usual and len(fits) == 1:
            usual = fits
        if found := wanted or next(iter(usual), None):
            columns[use] = found
    if "image" not in columns:
        raise ConfigurationError(
            f"{where}: which column holds the images is not clear, the columns are: {', '.join(features)}. Name it with "
            f"{options.option('image_column')}"
        )
    return columns


class _Table(ImageSource):
    """A split that datasets has opened."""

    def __init__(self, kind: str, options: SourceOptions, split: str, rows: Any, num_images: int | None):
        self.kind = {"hub": "datasets id", "disk": "datasets folder"}.get(kind, kind)
        super().__init__(options.source, num_images, split)
        features, self.subset = rows.features or {}, options.subset
        self.columns = _find_columns(features, self.where, options)
        self.labelled = "label" in self.columns
        option = options.option("label_column")
        self.why_unlabelled = f"no column of labels is found; name one of integers with {option}"
        self.class_names = getattr(features[self.columns["label"]], "names", None) if self.labelled else None
        rows = rows.select_columns([*self.columns.values()])
        self.rows = rows.cast_column(self.columns["image"], datasets.Image(decode=False))

    def to_row(self, values: Mapping[str, Any], name: str) -> Row:
        """The row of a dict of columns."""
        found = {use: values[column] for use, column in self.columns.items()}
        image, label, path = found.pop("image"), found.pop("label", None), None
        if isinstance(image, Mapping):
            image, path = image["bytes"], image.get("path")
        if path:  # a file of its own; what lies inside another file has at most a name
            name = path if "/" in path else f"{name}, {path}"
        if image is None:
            image = b"" if path is None else path if "://" in path else Path(path)
        return Row(name, image, -1 if label is None else label, **found)

    def provenance(self) -> dict[str, Any]:
        if self.kind == "parquet":
            return {}
        return {"split": self.split, "subset": self.subset, "fingerprint": self.rows._fingerprint}


class DatasetImages(_Table, IndexedSource):
    """A split, or a part of one, by row number."""

    def __init__(self, kind: str, options: SourceOptions, split: str, rows: datasets.Dataset, part: str):
        super().__init__(kind, options, split, rows, len(rows))
        if part:
            self.rows = self.rows.select(positions(part, len(rows), self.column("label")))
            self.num_images = len(self.rows)
        self.warn_of_empty_classes()

    def __getitem__(self, position: int) -> Row:
        return self.to_row(self.rows[position], f"split {self.split!r}, row {position}")

    def column(self, name: str) -> np.ndarray | None:
        if name not in self.columns:
            return None
        values = self.rows.select_columns([self.columns[name]]).with_format("arrow")[:].column(0)
        return values.fill_null(-1).to_numpy().astype(np.int64)


class StreamedImages(_Table):
    """A split from beginning to end; its shards are its files."""

    def stream(self, num_shards: int) -> datasets.IterableDataset:
        return self.rows

    def row(self, values: Mapping[str, Any]) -> Row:
        return self.to_row(values, f"split {self.split!r}")

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        rows, position = iter(self.rows), 0
        for block in blocks:
            try:
                found = list(itertools.islice(rows, block.start - position, block.stop - position))
            except READING_ERRORS as error:
                raise ConfigurationError(f"{self.where} is damaged: {first_line(error)}") from error
            position = block.stop
            names = (f"split {self.split!r}, row {i}" for i in block)
            yield [self.to_row(values, name) for values, name in zip(found, names, strict=True)]
