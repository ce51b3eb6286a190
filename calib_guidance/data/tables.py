"""Tables of images: parquet and arrow files, folders that ``save_to_disk`` of datasets wrote, and data sets of the hub."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from calib_guidance.data.base import ImageSource, IndexedSource, OptionName, Row, positions
from calib_guidance.errors import ConfigurationError

Rows = datasets.Dataset | datasets.IterableDataset

# Usual names of columns, tried in order.
_USUAL = {"image": ("image", "img", "png", "jpg"), "label": ("label", "labels", "fine_label", "class")}


def _files_of_split(kind: str, source: str, split: str | None, option: OptionName) -> tuple[str, list[str]]:
    """The parquet or arrow files of a split, in order of their names, and the name of the split.

    Args:
        kind: ``parquet`` or ``arrow``.
        source: a folder, whose files have the names that datasets looks for (``train-*.parquet``, ``train/*.parquet``); or a
            pattern, with ``{split}`` where a split's files have its name. A pattern without it holds one split, ``train``,
            unless the files are named as the hub does (``train-00000-of-00005.parquet``).
        split: name, without a part; None takes the only one.
        option: names options in messages.

    Raises:
        ConfigurationError: no such files, or several splits and none is named.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        patterns = get_data_patterns(str(path))
        found = DataFilesDict.from_patterns(patterns, base_path=str(path), allowed_extensions=[f".{kind}"])
        splits = {str(name): sorted(files) for name, files in found.items() if files}
    else:
        pattern = str(path).replace("{split}", split or "{split}")
        splits: dict[str, list[str]] = {}
        for file in sorted(glob.glob(pattern, recursive=True)):
            named = re.fullmatch(r"(.+)-\d+-of-\d+\.\w+", Path(file).name)
            splits.setdefault(named[1] if named else "train", []).append(file)
        if not splits:
            raise ConfigurationError(f"{option('source')}: no files match {pattern}")
        if "{split}" in source or len(splits) == 1:
            files = sorted(file for files in splits.values() for file in files)
            splits = splits | {"train": files} if "{split}" not in source else {split: files}
            split = split or "train"
    if split is None and len(splits) > 1:
        raise ConfigurationError(
            f"{source} has files of several splits, {', '.join(splits)}: name one with {option('split')}"
        )
    split = split or next(iter(splits))
    if split not in splits:
        raise _no_split(source, split, splits, option)
    return split, splits[split]


def _no_split(source: str, split: str, splits: Iterable[object], option: OptionName) -> ConfigurationError:
    return ConfigurationError(
        f"{source} has no split {split!r}; it has: {', '.join(map(str, splits))}. Name a split with {option('split')}"
    )


def open_table(
    kind: str,
    source: str,
    split: str | None,
    subset: str | None,
    columns: Mapping[str, str | None],
    streaming: bool,
    option: OptionName,
) -> DatasetImages | StreamedImages:
    """One split of a table.

    Args:
        kind: ``parquet``, ``arrow``, ``disk`` (of ``save_to_disk``) or ``hub``.
        source: path, pattern or id.
        split: name, or of what is not streamed a part such as ``train[:90%]``; None is the only one, or ``train``.
        subset: of a hub data set that has several.
        columns: see :class:`Table`.
        streaming: without a copy in the cache; what ``save_to_disk`` wrote needs none.
        option: names options in messages.

    Raises:
        ConfigurationError: it is not there, cannot be reached, or has no such columns.
    """
    count = None
    if kind == "disk":
        split, rows = _saved(source, split or "train", option)
    else:
        base, bracket, part = (split or ("train" if kind == "hub" else "")).partition("[")
        load: dict[str, Any] = {"path": source, "name": subset}
        if kind != "hub":
            base, files = _files_of_split(kind, source, base or None, option)
            load = {"path": kind, "data_files": {base: files}}
            count = _num_rows(source, files) if kind == "parquet" else None
        split = f"{base}{bracket}{part}"
        rows = _loaded(source, split, load | {"streaming": streaming}, option)
    if isinstance(rows, datasets.Dataset):
        return DatasetImages(source, kind, split, subset, rows, len(rows), columns, option)
    if count is None:
        count = getattr((rows.info.splits or {}).get(split), "num_examples", None)
    return StreamedImages(source, kind, split, subset, rows, count, columns, option)


def _saved(source: str, split: str, option: OptionName) -> tuple[str, datasets.Dataset]:
    loaded = datasets.load_from_disk(str(Path(source).expanduser()))
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    base, bracket, part = split.partition("[")
    if base not in splits:
        raise _no_split(source, split, splits, option)
    rows = splits[base]
    return split, rows.select(positions(bracket + part, len(rows))) if part else rows


def _num_rows(source: str, files: list[str]) -> int:
    try:
        return sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"{source} cannot be read as parquet: {error}") from error


def _loaded(source: str, split: str, load: dict[str, Any], option: OptionName) -> Rows:
    try:
        splits = datasets.load_dataset(**load)
        if split in splits:
            return splits[split]
        if split.partition("[")[0] in splits and not load["streaming"]:
            return datasets.load_dataset(split=split, **load)
    except (datasets.exceptions.DatasetNotFoundError, GatedRepoError, ConnectionError, HfHubHTTPError) as error:
        raise _unreachable(source, error, option) from error
    raise _no_split(source, split, splits, option)


def _unreachable(source: str, error: Exception, option: OptionName) -> ConfigurationError:
    page = f"https://huggingface.co/datasets/{source}"
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
    return ConfigurationError(
        f"the hub data set {source} cannot be reached ({error}), and there is no path of that name here. Without a network, name "
        f"a local copy with {option('source')}"
    )


def _holds(feature: Any, use: str) -> bool:
    """Whether a column can be one of images, or of integers."""
    kind = getattr(feature, "dtype", "")
    if use != "image":
        return "int" in kind
    encoded = isinstance(feature, Mapping) and "bytes" in feature
    return encoded or isinstance(feature, datasets.Image) or kind in ("binary", "large_binary")


class Table:
    """The columns of a table of images, mixed into its readers.

    Args:
        features: of the table.
        where: the table, for messages.
        columns: name of the ``image``, ``label``, ``time`` and ``index`` column, or None: images and labels are then looked for
            under usual names.
        option: names options in messages.

    Attributes:
        columns: the names of those that there are.

    Raises:
        ConfigurationError: one that is named is not there or holds something else, or images are not found.
    """

    def find_columns(
        self, features: datasets.Features, where: str, columns: Mapping[str, str | None], option: OptionName
    ) -> None:
        self.columns: dict[str, str] = {}
        for use in ("image", "label", "time", "index"):
            wanted, fits = columns.get(use), [name for name, feature in features.items() if _holds(feature, use)]
            if wanted is not None and wanted not in fits:
                state = f"holds {features[wanted]}" if wanted in features else "is not there"
                raise ConfigurationError(
                    f"{where}: {option(f'{use}_column')} {wanted!r} {state}; the columns that fit are: "
                    f"{', '.join(fits) or 'none'}"
                )
            usual = [name for name in _USUAL.get(use, ()) if name in fits]
            if use == "image" and not usual and len(fits) == 1:
                usual = fits
            if found := wanted or next(iter(usual), None):
                self.columns[use] = found
        if "image" not in self.columns:
            raise ConfigurationError(
                f"{where}: which column holds the images is not clear, the columns are: {', '.join(features)}. Name it with "
                f"{option('image_column')}"
            )
        self.labelled = "label" in self.columns
        self.class_names = getattr(features[self.columns["label"]], "names", None) if self.labelled else None

    def to_row(self, values: Mapping[str, Any], name: str) -> Row:
        """The row of a dict of columns."""
        found = {use: values[column] for use, column in self.columns.items()}
        image, label = found.pop("image"), found.pop("label", None)
        path = None
        if isinstance(image, Mapping):
            image, path = image["bytes"], image.get("path")
        if path and "/" in path:  # a file of its own; what lies inside another file has at most a name
            name = path
        elif path:
            name = f"{name}, {path}"
        if image is None:
            image = b"" if path is None else path if "://" in path else Path(path)
        return Row(name, image, -1 if label is None else label, **found)


class _Loaded(Table, ImageSource):
    """A split that datasets has opened.

    Args:
        name: path, pattern or id.
        kind: see :func:`open_table`.
        split: its name.
        subset: of a hub data set.
        rows: of the split.
        num_images: None for a stream that does not state it.
        columns, option: see :class:`Table`.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        split: str,
        subset: str | None,
        rows: Rows,
        num_images: int | None,
        columns: Mapping[str, str | None],
        option: OptionName,
    ):
        self.kind = {"hub": "datasets id", "disk": "datasets folder"}.get(kind, kind)
        super().__init__(name, num_images, split)
        self.find_columns(rows.features or {}, self.where, columns, option)
        self.subset, rows = subset, rows.select_columns([*self.columns.values()])
        self.rows = rows.cast_column(self.columns["image"], datasets.Image(decode=False))

    def provenance(self) -> dict[str, Any]:
        if self.kind == "parquet":
            return {}
        return {"split": self.split, "subset": self.subset, "fingerprint": self.rows._fingerprint}


class DatasetImages(_Loaded, IndexedSource):
    """A split by row number."""

    def __getitem__(self, position: int) -> Row:
        return self.to_row(self.rows[position], f"split {self.split!r}, row {position}")

    def column(self, name: str) -> np.ndarray | None:
        if name not in self.columns:
            return None
        values = self.rows.select_columns([self.columns[name]]).with_format("arrow")[:].column(0)
        return values.fill_null(-1).to_numpy().astype(np.int64)


class StreamedImages(_Loaded):
    """A split from beginning to end, without a copy in the cache of datasets.

    Attributes:
        rows: dicts of columns, for :meth:`row`.
    """

    def row(self, values: Mapping[str, Any]) -> Row:
        return self.to_row(values, f"split {self.split!r}")

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        rows, position = iter(self.rows), 0
        for block in blocks:
            try:
                found = list(itertools.islice(rows, block.start - position, block.stop - position))
            except (OSError, pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
                raise ConfigurationError(f"{self.where} is damaged: {error}") from error
            position = block.stop
            names = (f"split {self.split!r}, row {i}" for i in block)
            yield [self.to_row(values, name) for values, name in zip(found, names, strict=True)]
