"""Opens whatever holds images: a run folder, an ``.npz``, a folder, parquet or arrow files, or a data set of the hub."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from calib_guidance.data.base import ImageSource, OptionName, flag
from calib_guidance.data.folders import IMAGE_ENDINGS, FolderImages, is_loop
from calib_guidance.data.npz import NpzImages
from calib_guidance.data.run_images import RunImages
from calib_guidance.data.tables import open_table
from calib_guidance.errors import ConfigurationError

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_COLUMNS = ("image", "label", "time", "index")
_TABLE_OPTIONS = {"split", *(f"{use}_column" for use in _COLUMNS)}
# The options that mean something for each kind.
_OPTIONS = {
    "run folder": set(),
    "npz": set(),
    "image folder": {"split"},
    "parquet": _TABLE_OPTIONS,
    "arrow": _TABLE_OPTIONS,
    "disk": _TABLE_OPTIONS,
    "hub": _TABLE_OPTIONS | {"subset"},
}


def source_kind(source: str | os.PathLike[str], option: OptionName = flag) -> str:
    """``run folder``, ``npz``, ``image folder``, ``parquet``, ``arrow``, ``disk`` (of ``save_to_disk``) or ``hub``.

    A folder is of the kind of the first folder in it, from the top, that holds tables or images.

    Raises:
        ConfigurationError: no such path, or nothing in it that is known.
    """
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    if path.is_dir():
        return _folder_kind(path)
    if ending in _TABLES:
        return _TABLES[ending]
    if ending == ".npz":
        return "npz"
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) and not path.exists():
        return "hub"
    raise ConfigurationError(
        f"{option('source')}: {source} is neither a folder, nor a pattern of .parquet or .arrow files, nor an .npz file, nor a "
        "hub id such as ILSVRC/imagenet-1k"
    )


def _folder_kind(path: Path) -> str:
    if (path / "run.json").is_file():
        return "run folder"
    if (path / "samples").is_dir() and (path / "shards").is_dir():
        raise ConfigurationError(
            f"{path} is a run folder without its run.json, which says what made the samples: restore it"
        )
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "disk"
    folders = [path]
    for folder in folders:
        entries = sorted(folder.iterdir())
        endings = {entry.suffix.lower() for entry in entries if not entry.name.startswith(".")}
        for ending, kind in _TABLES.items():
            if ending in endings:
                return kind
        if endings & IMAGE_ENDINGS:
            return "image folder"
        folders += [entry for entry in entries if entry.is_dir() and not is_loop(entry)]
    raise ConfigurationError(
        f"no images found in {path}: it holds no .parquet, .arrow, .png, .jpg, .webp or other images"
    )


def open_source(
    source: str | os.PathLike[str],
    split: str | None = None,
    subset: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    time_column: str | None = None,
    index_column: str | None = None,
    access: str = "ordered",
    option: OptionName = flag,
) -> ImageSource:
    """Images of any kind.

    Args:
        source: a run folder (``run.json`` in it); an ``.npz`` with ``arr_0``; a folder of images, see
            :class:`~calib_guidance.data.folders.FolderImages`; a folder or a pattern of parquet or arrow files; a folder that
            ``save_to_disk`` of datasets wrote; or a hub id.
        split: of folders and tables that have several, such as ``validation`` or ``train[:90%]``.
        subset: of a hub data set that has several.
        image_column, label_column: names in a table; None looks for the usual ones.
        time_column, index_column: of the diffusion step and of the number of each image; None where there are none.
        access: ``ordered`` (for :meth:`ImageSource.read`), ``random`` (an IndexedSource), or ``stream`` (StreamedImages, without
            a copy in the cache where one would be needed).
        option: names options in messages.

    Raises:
        ConfigurationError: there is nothing, or something else, or an option has no meaning for it.
    """
    name, kind = str(source), source_kind(source, option)
    columns = {"image": image_column, "label": label_column, "time": time_column, "index": index_column}
    if kind == "run folder" and access != "ordered":
        name, kind = f"{glob.escape(name)}/samples/*.parquet", "parquet"
    if kind == "npz" and access != "ordered":
        raise ConfigurationError(
            f"{option('source')}: {name} is an .npz, which is not read in random order: save it as a folder"
        )
    given = {"split": split, "subset": subset} | {f"{use}_column": column for use, column in columns.items()}
    if useless := [key for key, value in given.items() if value is not None and key not in _OPTIONS[kind]]:
        raise ConfigurationError(f"{option(useless[0])} has no meaning for {name}, which is of the kind {kind}")
    if kind == "run folder":
        return RunImages(name)
    if kind == "npz":
        return NpzImages(name)
    if kind == "image folder":
        return FolderImages(name, split, option)
    # A run over all images needs no copy of parquet files in the cache of datasets.
    streaming = access == "stream" or (access == "ordered" and kind == "parquet" and "[" not in (split or ""))
    return open_table(kind, name, split, subset, columns, streaming, option)
