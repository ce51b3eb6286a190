"""Where images come from: the hub, a folder of images, parquet or arrow files, all read by ``datasets``."""

from __future__ import annotations

import glob
import re
from pathlib import Path

import datasets
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image

from calib_guidance.errors import ConfigurationError

Rows = datasets.Dataset | datasets.IterableDataset

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_FOLDERS = {"validation": ("validation", "val", "valid")}


class ImageSource:
    """The splits of a data set of images.

    Args:
        source: a hub id (``ILSVRC/imagenet-1k``); a folder with a folder for each split (train, validation or val, test) with a
            folder of images for each class; a folder or pattern of parquet or arrow files, with ``{split}`` in the pattern where
            the files of a split have its name; or a folder that ``save_to_disk`` of datasets wrote.
        subset: of a hub data set that has several.
        streaming: read hub data and parquet or arrow files from beginning to end, without a copy in the cache.
        source_setting, split_settings: where source and splits are named, for messages.
    """

    def __init__(
        self,
        source: str,
        subset: str | None,
        streaming: bool,
        source_setting: str = "data.init_args.source",
        split_settings: str = "data.init_args.train_split, val_split and test_split",
    ):
        self.source, self.subset, self.streaming = source, subset, streaming
        self.source_setting, self.split_settings = source_setting, split_settings
        self.path = Path(source).expanduser()

    def kind(self) -> str:
        """hub, disk, images, parquet or arrow.

        Raises:
            ConfigurationError: no such path, or nothing in it that is known.
        """
        if self.path.is_dir():
            if any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                return "disk"
            images = Image.registered_extensions()
            for file in self.path.rglob("*"):
                if file.suffix.lower() in _TABLES:
                    return _TABLES[file.suffix.lower()]
                if file.suffix.lower() in images:
                    return "images"
            raise ConfigurationError(f"{self.source_setting}: no images found in {self.source}")
        if self.path.suffix.lower() in _TABLES:
            return _TABLES[self.path.suffix.lower()]
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.source):
            return "hub"
        raise ConfigurationError(
            f"{self.source_setting}: {self.source} is neither a folder, nor a pattern of .parquet or .arrow files, nor a hub id "
            "such as ILSVRC/imagenet-1k"
        )

    def split(self, name: str) -> Rows:
        """One split, as an IterableDataset where it is streamed.

        Args:
            name: of the split. Of what is not streamed, also a part, such as ``train[:90%]``.

        Raises:
            ConfigurationError: it is not there, holds nothing, or cannot be reached.
        """
        kind = self.kind()
        if kind == "images":
            rows = self._folder(name)
        elif kind == "disk":
            loaded = datasets.load_from_disk(str(self.path))
            rows = self._named(loaded if isinstance(loaded, dict) else {"train": loaded}, name)
        elif kind == "hub":
            rows = self._hub(name)
        else:
            rows = self._tables(kind, name)
        if isinstance(rows, datasets.Dataset) and len(rows) == 0:
            raise ConfigurationError(f"{self.source_setting}: no images found in split {name!r} of {self.source}")
        return rows

    def _named(self, splits: dict[str, Rows], split: str, **load: object) -> Rows:
        if split in splits:
            return splits[split]
        if split.partition("[")[0] in splits and load and not self.streaming:
            return datasets.load_dataset(split=split, **load)
        raise ConfigurationError(
            f"{self.source} has no split {split!r}; it has: {', '.join(map(str, splits))}. "
            f"Name them with {self.split_settings}"
        )

    def _folder(self, name: str) -> Rows:
        base, bracket, part = name.partition("[")
        folders = [folder for folder in _FOLDERS.get(base, (base,)) if (self.path / folder).is_dir()]
        if not folders:
            there = sorted(folder.name for folder in self.path.iterdir() if folder.is_dir())
            raise ConfigurationError(
                f"{self.source} has no folder {' or '.join(_FOLDERS.get(base, (base,)))} for split {name!r}; it has: "
                f"{', '.join(there)}. Name them with {self.split_settings}"
            )
        folder = (self.path / folders[0]).resolve()
        images = Image.registered_extensions()
        if not any(file.suffix.lower() in images for file in folder.rglob("*")):
            raise ConfigurationError(f"{self.source_setting}: no images found in {folder}")
        # Each split on its own, so that its class names are those of its own folders.
        return datasets.load_dataset(
            "imagefolder",
            data_files={"train": f"{glob.escape(str(folder))}/**"},
            split=f"train{bracket}{part}",
            drop_labels=False,
            drop_metadata=True,
        )

    def _tables(self, kind: str, name: str) -> Rows:
        if self.path.is_dir():
            where = {"data_dir": str(self.path)}
        else:
            pattern = str(self.path).replace("{split}", name.partition("[")[0])
            if not glob.glob(pattern, recursive=True):
                raise ConfigurationError(f"{self.source_setting}: no files match {pattern}")
            where = {"data_files": {name.partition("[")[0]: pattern} if "{split}" in self.source else pattern}
        load = {"path": kind, "streaming": self.streaming, **where}
        return self._named(datasets.load_dataset(**load), name, **load)

    def _hub(self, name: str) -> Rows:
        load = {"path": self.source, "name": self.subset, "streaming": self.streaming}
        page = f"https://huggingface.co/datasets/{self.source}"
        try:
            return self._named(datasets.load_dataset(**load), name, **load)
        except (datasets.exceptions.DatasetNotFoundError, GatedRepoError) as error:
            if isinstance(error, GatedRepoError) or "gated" in str(error):
                message = (
                    f"the hub data set {self.source} needs a login: accept its terms at {page}, then run `hf auth login` or set "
                    "HF_TOKEN to a token of that account"
                )
            else:
                message = (
                    f"{self.source_setting}: {self.source} is neither a path here nor a data set on the hub that this account "
                    f"may read. If {page} is private, run `hf auth login` or set HF_TOKEN"
                )
            raise ConfigurationError(message) from error
        except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            raise ConfigurationError(
                f"the hub data set {self.source} cannot be reached ({error}), and there is no path of that name here. Without a "
                f"network, name a local copy with {self.source_setting}"
            ) from error
