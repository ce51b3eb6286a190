"""Opens whatever holds images: a run folder, an ``.npz``, a folder, parquet or arrow files, or a data set of the hub."""

from __future__ import annotations

import glob
import re
from dataclasses import replace
from pathlib import Path

from calib_guidance.data.base import ImageSource, SourceOptions
from calib_guidance.data.folders import IMAGE_ENDINGS, FolderImages, is_loop
from calib_guidance.data.npz import NpzImages
from calib_guidance.data.run_images import RunImages
from calib_guidance.errors import ConfigurationError, closest

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_OPTIONS = ("split", "subset", "image_column", "label_column", "time_column", "index_column")


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
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", options.source) and not path.exists():
        if path.parent != Path() and path.parent.is_dir():
            _check_misspelt(options)
        return "hub"
    raise ConfigurationError(
        f"{options.option('source')}: {options.source} is neither a folder, nor a pattern of .parquet or .arrow files, nor an "
        ".npz file, nor a hub id such as ILSVRC/imagenet-1k"
    )


def _check_misspelt(options: SourceOptions) -> None:
    """Raise ConfigurationError for a missing folder beside runs or folders of like names, instead of asking the hub."""
    folders = [entry.name for entry in options.path.parent.iterdir() if entry.is_dir()]
    near = closest(options.path.name, folders)
    if near or any((options.path.parent / name / "run.json").exists() for name in folders):
        raise ConfigurationError(
            f"{options.option('source')}: there is no {options.path.name} in {options.path.parent}{near}"
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


def open_source(options: SourceOptions, access: str = "ordered") -> ImageSource:
    """Images of any kind.

    Args:
        options: of the source.
        access: ``ordered`` (for :meth:`ImageSource.read`), ``random`` (an IndexedSource), or ``stream`` (an IndexedSource or
            StreamedImages, without a copy in the cache).
    """
    from calib_guidance.data.tables import open_table  # imports datasets

    kind = source_kind(options)
    if kind == "run folder" and access != "ordered":
        options, kind = replace(options, source=f"{glob.escape(options.source)}/samples/*.parquet"), "parquet"
    if kind == "npz" and access != "ordered":
        raise ConfigurationError(
            f"{options.option('source')}: {options.source} is an .npz, which is only read in order: save it as a folder"
        )
    allowed = {"run folder": (), "npz": (), "image folder": ("split",), "hub": _OPTIONS}
    for name in _OPTIONS:
        if getattr(options, name) is not None and name not in allowed.get(kind, {*_OPTIONS} - {"subset"}):
            raise ConfigurationError(
                f"{options.option(name)} has no meaning for {options.source}, which is of the kind {kind}"
            )
    if kind == "run folder":
        return RunImages(options.source)
    if kind == "npz":
        return NpzImages(options.source)
    if kind == "image folder":
        return FolderImages(options)
    # Reading in order needs no copy of parquet files in the cache of datasets.
    streaming = access == "stream" or (access == "ordered" and kind == "parquet" and "[" not in (options.split or ""))
    return open_table(kind, options, streaming)
