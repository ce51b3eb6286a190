"""Files of a run folder: its identity, tables of samples, a record of each, and what measurements keep of them.

A run is cut into shards of consecutive sample indices. The record of a shard is written last: a shard with a record is done.

::

    FOLDER/
      run.json                     identity (everything that samples are a function of), shard size, number of samples
      samples/00000000.parquet     samples of the shard that starts at that index; their bytes depend on nothing else
      shards/00000000.json         its record: checksums, rows, failed samples, seconds, worker
      shards/00000000.safetensors  sums over the shard and rows of single samples, if measurements keep any
      claims/00000000              a worker makes the shard; the age of the file tells whether it is alive

The identity of a run is everything that a sample is a function of beside its index. Runs of one identity may share a folder.
Reading a run folder needs neither torch nor Lightning, whose import takes longer than reading.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load as load_arrays

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.backend.shipped import find_file
from calib_guidance.errors import ConfigurationError, RunError, StoppedError

REAL_IMAGES = "reference_images.npz"  # a few reference images beside the metrics, for people
FORMAT = 3
# Types of the fields of run.json, of a record (see RunFolder.write) and of a failed sample in it.
_RUN = {"fingerprint": str, "identity": dict, "versions": dict, "created": str, "shard_size": int, "num_samples": int}
_RECORD = {
    **dict.fromkeys(("run", "sha256", "device", "host", "worker", "written"), str),
    **dict.fromkeys(("first", "requested", "rows", "bytes"), int),
    **{"failed": list, "sums_sha256": (str, NoneType), "seconds": (int, float)},
}
_FAILED = {"index": int, "step": (int, float, NoneType), "reason": str}
_MOST_SHARDS = 1_000_000
_UNSET = "(not set)"
# How much is done at a time, and by how many; up to rounding it changes nothing.
_NOT_PIXELS = {
    *("compile", "decode_batch", "num_samples", "batch_size", "shard_size", "num_workers", "max_corrupt", "class_names")
}
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


class CorruptedShardError(RunError):
    """A shard whose files disagree with its record."""


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """JSON that has equal bytes for equal contents."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON mapping with its checksum, see :func:`read_checked`."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return content | {"checksum": sha256(canonical_json(content))}


def checked_json(content: Mapping[str, Any]) -> bytes:
    """JSON for people of a mapping and its checksum, see :func:`read_checked`."""
    return json.dumps(with_checksum(content), indent=1, ensure_ascii=False).encode() + b"\n"


def _check_types(content: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(content.get(name, ...), kind) or isinstance(content[name], bool):
            raise ValueError(f"{name} is {content.get(name, 'missing')!r:.80}")


def read_checked(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`checked_json` wrote, with fields of these types; else ValueError, and FileNotFoundError without a file."""
    if not path.is_file() and os.path.lexists(path):
        raise ValueError("it is not a regular file")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError("it has no checksum: it is damaged, or of another version")
    if content["checksum"] != with_checksum(content)["checksum"]:
        raise ValueError("its checksum is wrong")
    _check_types(content, types)
    return content


def check_size(num_samples: int, shard_size: int) -> None:
    """Raise ConfigurationError for a number of samples that cannot be cut into shards."""
    if num_samples < 1 or shard_size < 1:
        raise ConfigurationError(f"num_samples and shard_size must be at least 1, got {num_samples} and {shard_size}")
    if num_samples > _MOST_SHARDS * shard_size:
        raise ConfigurationError(
            f"{num_samples:,} samples in shards of {shard_size:,} are more than {_MOST_SHARDS:,} files: raise data.shard_size"
        )


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Content of a folder's run.json, see :meth:`~calib_guidance.runs.folder.RunFolder.begin`; None if there is none."""
    file = Path(folder) / "run.json"
    try:
        run = read_checked(file, {"format": int})
        if run["format"] != FORMAT:
            raise ValueError(f"format {run['format']}, this version of calib_guidance reads {FORMAT}")
        _check_types(run, _RUN)
        check_size(run["num_samples"], run["shard_size"])
        if run["fingerprint"] != sha256(canonical_json(run["identity"])):
            raise ValueError("its fingerprint is not that of its identity")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigurationError(
            f"{file} is corrupted ({error}): restore it, or choose another folder (trainer.default_root_dir)"
        ) from error
    return run


def differences(run: Mapping[str, Any], identity: Mapping[str, Any], shard_size: int) -> list[str]:
    """Where a run.json differs from an identity and a shard size, ``key: then, now`` each."""
    then = run["identity"] | {"shard_size": run["shard_size"]}
    now = json.loads(canonical_json(identity)) | {"shard_size": shard_size}
    return [
        f"{key}: {then.get(key, _UNSET)} in the folder, now {now.get(key, _UNSET)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, _UNSET) != now.get(key, _UNSET)
    ]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is neither a mapping nor a list of mappings."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, each in items:
        yield from leaves(each, f"{key}.{name}" if key else str(name))


@functools.cache
def _hash_of_version(path: Path, modified: int, size: int) -> str:
    return file_sha256(path)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, taken once as long as it is not changed."""
    status = os.stat(path)
    return _hash_of_version(Path(path), status.st_mtime_ns, status.st_size)


def settings(config: Mapping[str, Any], key: str, loaded: bool = False, trains: bool = False) -> dict[str, Any]:
    """Leaves of a part of the configuration, whose dotted keys start with ``key``; files by content, wherever they are.

    ``loaded`` leaves out files of weights: what was loaded from them is hashed. ``trains`` keeps how much is done at a time:
    training depends on it.
    """
    found: dict[str, Any] = {}
    for name, value in leaves(config, key):
        if name.rpartition(".")[2] in _NOT_PIXELS and not trains:
            continue
        # A file of the working directory that happens to be named like a setting does not count.
        is_path = isinstance(value, str) and ("/" in value or Path(value).suffix or name.endswith(".labels"))
        path = find_file(value) if is_path else None
        if loaded and path is not None and (path.suffix in _WEIGHTS or path.is_dir()) and path.exists():
            continue
        found[name] = value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
        if path is not None and path.is_file():
            found[name] = f"sha256 of the file {file_hash(path)}"
    return found


def settings_digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the options of a class."""
    return sha256(json.dumps(settings(config, "init_args"), sort_keys=True, default=str).encode())[:8]


def hash_state(module: Any) -> str:
    """SHA-256 of names, types, shapes and bytes of a module's state."""
    import torch  # only sampling hashes weights; looking at a folder needs no torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name.replace('_orig_mod.', '')} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def run_identity(
    config: Mapping[str, Any], networks: Mapping[str, Any], precision: str, uint8_rule: str
) -> dict[str, Any]:
    """Identity of a run: dotted keys of the configuration, and hashes of the loaded networks.

    In it: everything of ``model`` and ``data`` except how many samples there are and how many are made at a time, precision, and
    the rule of rounding to 8 bits. Not in it: devices, nodes, callbacks that only measure, and where files are.
    """
    identity = settings(config["model"], "model", loaded=True) | settings(config["data"], "data")
    identity |= {f"weights of {name}": hash_state(module) for name, module in networks.items()}
    return identity | {"trainer.precision": precision, "uint8_rule": uint8_rule}


def cut(rows: range, size: int) -> list[range]:
    """Consecutive pieces of ``size``; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def pixels(png: bytes) -> np.ndarray:
    """Image ``(H, W, C)`` uint8 of a PNG."""
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


def label_names(schema: pa.Schema) -> list[str] | None:
    """Names of classes that a table of samples states; None where they are their numbers."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = stated.get("info", {}).get("features", {}).get("label", {}).get("names")
    return None if names == [str(number) for number in range(len(names or ()))] else names


def read_table(data: bytes | str | os.PathLike[str], indices: Collection[int] | None = None) -> dict[str, np.ndarray]:
    """Samples of a parquet file (its path or bytes), all or those with the given indices.

    ``image`` uint8 ``(N, C, H, W)`` and every other column ``(N,)`` int64: ``index``, ``label``, ``seed`` …
    """
    table = pq.read_table(io.BytesIO(data) if isinstance(data, bytes) else data)
    if indices is not None:
        table = table.filter(np.isin(table["index"], list(indices)))
    columns = table.to_pydict()
    images = [pixels(image["bytes"]).transpose(2, 0, 1) for image in columns.pop("image")]
    numbers = {name: np.asarray(column, dtype=np.int64) for name, column in columns.items()}
    return {"image": np.stack(images) if images else np.zeros((0, 0, 0, 0), np.uint8), **numbers}


class ShardStore:
    """Tables, records and sums of the shards in a folder; see :class:`~calib_guidance.runs.folder.RunFolder`."""

    def __init__(self, path: str | os.PathLike[str], shard_size: int, num_requests: int, worker: str):
        self.path, self.shard_size, self.num_requests, self.worker = Path(path), shard_size, num_requests, worker
        self.samples, self.records = self.path / "samples", self.path / "shards"
        self.fingerprint: str | None = None  # records of another run are corrupted shards; None accepts all

    def shards(self) -> list[range]:
        """Indices of every shard, in order; the last shard may be short."""
        return cut(range(self.num_requests), self.shard_size)

    def file(self, shard: range, ending: str) -> Path:
        """File of a shard: its samples (``parquet``), its record (``json``) or its sums (``safetensors``)."""
        return (self.samples if ending == "parquet" else self.records) / f"{shard.start:08d}.{ending}"

    def record(self, shard: range) -> dict[str, Any] | None:
        """Record of a shard, None if there is none; its fields are those of :meth:`RunFolder.write`."""
        path = self.file(shard, "json")
        try:
            record = read_checked(path, _RECORD)
            self._check_numbers(record)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptedShardError(f"{path.name} cannot be read: {error}") from error
        # A record that was copied here with its files agrees with them.
        if record["first"] != shard.start:
            raise CorruptedShardError(f"{path.name} is the record of the shard that starts at {record['first']}")
        if self.fingerprint not in (None, record["run"]):
            raise CorruptedShardError(f"{path.name} is the record of another run")
        return record

    @staticmethod
    def _check_numbers(record: Mapping[str, Any]) -> None:
        """Raise ValueError for a record whose fields contradict each other."""
        first, requested, rows, failed = (record[key] for key in ("first", "requested", "rows", "failed"))
        for sample in failed:
            _check_types(sample if isinstance(sample, dict) else {}, _FAILED)
        indices = {sample["index"] for sample in failed}
        if not (rows + len(indices) == requested > 0 <= rows and indices <= set(range(first, first + requested))):
            raise ValueError(f"{rows} samples and the failed ones are not the {requested} requested ones")
        if record["bytes"] < 0 or not 0 <= record["seconds"] < math.inf:
            raise ValueError(f"bytes is {record['bytes']}, seconds {record['seconds']}")

    def readable_record(self, shard: range) -> dict[str, Any] | None:
        """Record of a shard; None for a corrupted one, too."""
        with contextlib.suppress(CorruptedShardError):
            return self.record(shard)
        return None

    def readable_records(self) -> Iterator[dict[str, Any]]:
        """Records of the shards that have one, without the corrupted ones."""
        return filter(None, map(self.readable_record, self.shards()))

    def samples_sha256(self) -> str:
        """Hash over the checksums of the tables that are there: what was measured of other tables was of other samples."""
        return sha256(canonical_json({str(record["first"]): record["sha256"] for record in self.readable_records()}))

    def stale(self, measured: Mapping[str, Any]) -> str | None:
        """Why the content of a metrics.json is not of the samples that are there now; None where it is, or does not say."""
        try:
            said = measured.get("provenance", {}).get("samples", {}).get("shards_sha256")
        except AttributeError:
            said = None
        counted = measured.get("num_measured", measured.get("num_samples"))
        rows = sum(record["rows"] for record in self.readable_records())
        if counted not in (None, rows):
            return f"of {counted} samples, and there are {rows} now"
        return "of other samples than those that are there now" if said not in (None, self.samples_sha256()) else None

    def check(self, shard: range, verify: bool = False) -> dict[str, Any] | None:
        """Record of a shard whose files agree with it; ``verify`` also reads the table and compares its checksum."""
        record = self.record(shard)
        if record is None:
            return None
        path = self.file(shard, "parquet")
        try:
            if (size := path.stat().st_size) != record["bytes"]:
                raise CorruptedShardError(f"{path.name} has {size} bytes, its record says {record['bytes']}")
            if verify:
                self._check_rows(path, self._read_verified(path, record["sha256"]), record["rows"])
            if record["sums_sha256"] is not None:
                self._read_verified(self.file(shard, "safetensors"), record["sums_sha256"])
        except FileNotFoundError as error:
            raise CorruptedShardError(f"{Path(error.filename).name} is missing") from error
        return record

    @staticmethod
    def _read_verified(path: Path, checksum: str) -> bytes:
        data = path.read_bytes()
        if sha256(data) != checksum:
            raise CorruptedShardError(f"{path.name} is not what was written: its checksum is wrong")
        return data

    @staticmethod
    def _check_rows(path: Path, data: bytes, rows: int) -> None:
        try:
            found = pq.read_metadata(io.BytesIO(data)).num_rows
        except pa.ArrowException as error:
            raise CorruptedShardError(f"{path.name} is not a table: {error}") from error
        if found != rows:
            raise CorruptedShardError(f"{path.name} has {found} samples, its record says {rows}")

    def _done(self, shard: range) -> dict[str, Any]:
        record = self.check(shard)
        if record is None:
            raise CorruptedShardError(f"{shard.start:08d}.parquet has no record")
        return record

    def read(self, shard: range, indices: Collection[int] | None = None) -> dict[str, np.ndarray]:
        """Samples of a shard, or those with the given indices, see :func:`read_table`."""
        return read_table(self.read_bytes(shard), indices)

    def read_bytes(self, shard: range) -> bytes:
        """Parquet file of a shard."""
        return self._read_verified(self.file(shard, "parquet"), self._done(shard)["sha256"])

    def read_sums(self, shard: range) -> dict[str, np.ndarray]:
        """Arrays that were given to :meth:`RunFolder.write` as sums."""
        record = self._done(shard)
        return {} if record["sums_sha256"] is None else load_arrays(self.file(shard, "safetensors").read_bytes())

    def put(self, path: Path, data: bytes) -> None:
        """Write a file of the folder atomically."""
        with self.stopping(path, len(data)), atomic_write(path) as file:
            file.write(data)

    @contextlib.contextmanager
    def stopping(self, path: Path, size: int) -> Iterator[None]:
        """Turn errors of writing ``path`` into a StoppedError that says what to do, such as how many bytes to free."""
        run = self.path / "run.json"
        try:
            if not self.path.is_dir() or not (path == run or run.exists()):
                raise FileNotFoundError(errno.ENOENT, "the run folder was moved or deleted", str(self.path))
            yield
        except OSError as error:
            why = f"{path} cannot be written: {error.strerror or error}"
            if not run.exists():
                raise StoppedError(
                    f"{why}. Re-run with its place as trainer.default_root_dir to resume, or to start again"
                ) from error
            done, cure = sum(1 for _ in self.readable_records()), "Remove the cause and re-run to resume"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why, cure = self._why_full(path, size, done)
            raise StoppedError(f"{why}. {done} complete shards are kept. {cure}") from error

    def _why_full(self, path: Path, size: int, done: int) -> tuple[str, str]:
        disk, left = os.statvfs(self.path), len(self.shards()) - done
        files = (file for folder in (self.samples, self.records) for file in folder.glob("*"))
        used = sum(file.stat().st_blocks * 512 for file in files)
        more = max(size, used // done if done else 0) * left
        return (
            f"{self.path} is full, or its quota is used up: {path.name} needs {size:,} bytes, "
            f"{disk.f_bavail * disk.f_frsize:,} are free",
            f"Free disk space (about {more:,} bytes for the remaining {left}) and re-run to resume",
        )
