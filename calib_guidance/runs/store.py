"""Files of a run folder: tables of samples, a record of each, and what measurements keep of them.

A run is cut into shards of consecutive sample indices. The record of a shard is written last: a shard with a record is done.

::

    FOLDER/
      run.json                     identity (everything that samples are a function of), shard size, number of samples
      samples/00000000.parquet     samples of the shard that starts at that index; their bytes depend on nothing else
      shards/00000000.json         its record: checksums, rows, failed samples, seconds, worker
      shards/00000000.safetensors  sums over the shard and rows of single samples, if measurements keep any
      claims/00000000              a worker makes the shard; the age of the file tells whether it is alive

Reading a run folder needs neither torch nor Lightning, whose import takes longer than reading.
"""

import contextlib
import errno
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load as load_arrays

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.errors import RunError, StoppedError
from calib_guidance.runs.integrity import canonical_json, read_record, sha256

REAL_IMAGES = "reference_images.npz"  # a few reference images beside the metrics, for people


class CorruptedShardError(RunError):
    """A shard whose files disagree with its record."""


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
            record = read_record(path)
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
