"""What the folder of a sampling run says, with a remark on everything that is missing or damaged."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from calib_guidance.backend.text import parse_yaml
from calib_guidance.errors import ConfigurationError, first_line
from calib_guidance.runs import CorruptedShardError, RunFolder, read_run
from calib_guidance.runs.status import survey
from calib_guidance.runs.store import REAL_IMAGES, label_names

T = TypeVar("T")

_LISTED = 5  # shards or samples in a remark
_STALE: Mapping[str, Any] = MappingProxyType({})


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file; ValueError where it is none, or lacks one of them."""
    try:
        # For a file that is not an archive, numpy says that it may be pickled, and how to load it all the same.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"not a valid npz file: {error}") from error


def _metrics(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it holds no metrics by name")
    return content


def _listed(things: Sequence[str]) -> str:
    more = f" and {len(things) - _LISTED} more" if len(things) > _LISTED else ""
    return ", ".join(things[:_LISTED]) + more


class Run:
    """One run of a report; ConfigurationError where the folder holds none, or it cannot be read.

    ``class_names`` come before those of the reference, and these before those of the samples.
    """

    def __init__(self, path: Path, name: str, class_names: Mapping[int, str] = MappingProxyType({})):
        if not path.is_dir():
            raise ConfigurationError(f"{path}: no such folder; report takes those of calib-guidance predict")
        self.path, self.name = path, name
        self.remarks: list[str] = []  # what is missing or damaged, and what to do about it
        try:
            self._read_all(class_names)
        except OSError as error:
            raise ConfigurationError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
        if self.status["complete"] and not self.metrics and not self.evaluation:
            self.remarks.append(
                "Nothing was measured: there is no metrics.json. The same predict command with RunReport among its callbacks "
                f"measures what is there, or calib-guidance evaluate {path}."
            )

    def _read_all(self, class_names: Mapping[int, str]) -> None:
        self.about = read_run(self.path)  # run.json
        if self.about is None:
            raise ConfigurationError(
                f"{self.path} holds no run: there is no run.json in it; report takes folders of calib-guidance predict"
            )
        self.identity = self.about["identity"]  # all that its samples are a function of, by dotted key
        self.folder = RunFolder.open(self.path)
        self.status = survey(self.folder)
        self._damaged: set[int] = set()
        self._remark_on_status()
        self.requests = self._read_requests()  # seed and label of the samples that can be read, by index
        self.seeds = sorted({seed for seed, _ in self.requests.values()})
        self.config_text, self.settings = self._read_config()  # config.yaml; empty where it cannot be read
        # What was measured of the samples that are there now; empty where nothing was.
        self.metrics = self._measured("metrics.json", "Re-run predict")
        evaluate = f"calib-guidance evaluate {self.path} measures them"
        self.evaluation = self._measured("evaluation/metrics.json", evaluate)
        # What evaluate wrote, else what predict did; of measurements that are not of these samples, nothing.
        folders = [name for name, of in (("evaluation/", self.evaluation), ("", self.metrics)) if of is not _STALE]
        # By index the class that the evaluation classifier predicts, and its confidence in that of the sample.
        self.verdicts = self._first(folders, "predictions.npz", self._read_verdicts) or {}
        # Some reference images; None where none were kept.
        self.real = self._first(folders, REAL_IMAGES, lambda path: read_arrays(path, ("label", "image", "name")))
        real = () if self.real is None else zip(self.real["label"].tolist(), self.real["name"].tolist(), strict=True)
        stated = {label: name for label, name in real if name} | dict(class_names)
        self._class_names = dict(enumerate(self._sampled_names or ())) | stated

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        return self._class_names.get(label, str(label))

    def _read(self, name: str, load: Callable[[Path], T]) -> T | None:
        try:
            return load(self.path / name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.remarks.append(f"{name} is damaged ({error}) and skipped: re-run what wrote it.")
            return None

    def _first(self, folders: Sequence[str], name: str, load: Callable[[Path], T]) -> T | None:
        found = (self._read(folder + name, load) for folder in folders)
        return next((each for each in found if each is not None), None)

    def _measured(self, name: str, cure: str) -> Mapping[str, Any]:
        """A file of metrics; empty where there is none, or where it is not of the samples that are there now."""
        found = self._read(name, _metrics) or {}
        if why := self.folder.stale(found):
            self.remarks.append(f"{name} is not shown: it is {why}. {cure}.")
            return _STALE
        return found

    def _read_verdicts(self, path: Path) -> dict[int, tuple[int, float]]:
        index, *said = read_arrays(path, ("index", "predicted", "confidence")).values()
        if index.ndim != 1 or any(column.shape != index.shape for column in said):
            raise ValueError("its columns differ in length")
        pairs = zip(*(column.tolist() for column in said), strict=True)
        return {i: pair for i, pair in zip(index.tolist(), pairs, strict=True) if i in self.requests}

    def _read_config(self) -> tuple[str, dict[str, Any]]:
        try:
            text = (self.path / "config.yaml").read_text()
            if isinstance(content := parse_yaml(text), dict):
                return text, content
            problem = "config.yaml is damaged (it holds no settings)"
        except FileNotFoundError:
            problem = "There is no config.yaml"
        except (ValueError, yaml.YAMLError) as error:
            problem = f"config.yaml is damaged ({first_line(error)})"
        self.remarks.append(f"{problem}: settings are those of run.json, which has all that samples are a function of.")
        return "", {}

    def attempt(self, what: str, make: Callable[..., T], *arguments: Any) -> T | None:
        """A part of the page, made of this run; None and a remark where what is kept of it is not what it should be."""
        try:
            return make(self, *arguments)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            self.remarks.append(f"{what} cannot be shown, what is kept of it is damaged: {why}.")
            return None

    def _remark_on_status(self) -> None:
        samples = self.status["samples"]
        if not self.status["complete"]:
            self.remarks.append(
                f"Not complete: {samples['written']} of {samples['requested']} samples are made, and only those are shown. "
                f"Re-run predict to resume; calib-guidance status {self.path} says who works on what."
            )
        for shard in self.status["corrupted"]:
            self._leave_out(range(shard["first"], shard["last"] + 1), shard["reason"])
        if failed := self.status["failed"]:
            reasons = [f"{sample['index']} ({sample['reason']})" for sample in failed]
            self.remarks.append(f"Failed samples: {_listed(reasons)}.")
        if foreign := self.status["foreign"]:
            self.remarks.append(f"Files that belong to no shard are not counted: {_listed(foreign)}.")

    def _leave_out(self, shard: range, reason: str) -> None:
        """Leave a damaged shard out of the page, and say so once."""
        if shard.start in self._damaged:
            return
        self._damaged.add(shard.start)
        self.remarks.append(
            f"Corrupted: samples {shard.start} to {shard[-1]} are not shown on this page ({reason}). Re-run predict to "
            "regenerate them."
        )

    def _read_requests(self) -> dict[int, tuple[int, int]]:
        """Without reading the images."""
        found: dict[int, tuple[int, int]] = {}
        self._sampled_names = None
        for shard in self.folder.shards():
            if shard.start in self._damaged or self.folder.state(shard).name != "done":
                continue
            path = self.folder.file(shard, "parquet")
            try:
                table = pq.read_table(path, columns=["index", "seed", "label"])
                index, *request = (table[name].to_pylist() for name in ("index", "seed", "label"))
                found |= dict(zip(index, zip(*request, strict=True), strict=True))
                self._sampled_names = self._sampled_names or label_names(table.schema)
            except (pa.ArrowException, KeyError, OSError) as error:
                self._leave_out(shard, f"{path.name} is not a table of samples: {error}")
        return found

    def images(self, indices: Collection[int]) -> dict[int, np.ndarray]:
        """Images uint8 ``(C, H, W)`` of the samples with such an index that are there.

        Every shard is checked against its checksum; a damaged one is skipped with a remark.
        """
        wanted, found = np.unique(np.asarray(list(indices), np.int64)), {}
        for shard in self.folder.shards():
            inside = wanted[(wanted >= shard.start) & (wanted < shard.stop)]
            if not len(inside) or shard.start in self._damaged:
                continue
            try:
                rows = self.folder.read(shard, inside.tolist())
                found |= dict(zip(rows["index"].tolist(), rows["image"], strict=True))
            except (CorruptedShardError, OSError, pa.ArrowException) as error:
                self._leave_out(shard, str(error))
        return found


def open_runs(paths: Sequence[Path], class_names: Mapping[int, str]) -> list[Run]:
    """The runs of a report, each named by as much of the end of its path as tells them apart."""
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ConfigurationError(f"{paths[number]} is given twice; a report compares different runs")
    length = 1
    while len({path.parts[-length:] for path in resolved}) < len(resolved):
        length += 1
    return [Run(path, "/".join(end.parts[-length:]), class_names) for path, end in zip(paths, resolved, strict=True)]
