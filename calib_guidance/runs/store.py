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

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load as load_arrays

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.errors import RunError, StoppedError

REAL_IMAGES = "reference_images.npz"  # a few reference images beside the metrics, for people


class CorruptedShardError(RunError):
    """A shard whose files disagree with its record."""


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """JSON of which equal contents have equal bytes."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def readable_json(content: Mapping[str, Any]) -> bytes:
    """JSON for people."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def cut(rows: range, size: int) -> list[range]:
    """Consecutive pieces of ``size``; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def pixels(png: bytes) -> np.ndarray:
    """Image ``(H, W, C)`` uint8 of a PNG."""
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


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
    """Tables, records and sums of the shards in a folder; see :class:`~calib_guidance.runs.folder.RunFolder`.

    Attributes:
        fingerprint: of the run; records of another run are corrupted shards. None accepts every record.
    """

    def __init__(self, path: str | os.PathLike[str], shard_size: int, num_requests: int, worker: str):
        self.path, self.shard_size, self.num_requests, self.worker = Path(path), shard_size, num_requests, worker
        self.samples, self.records = self.path / "samples", self.path / "shards"
        self.fingerprint: str | None = None

    def shards(self) -> list[range]:
        """Indices of every shard, in order; the last shard may be short."""
        return cut(range(self.num_requests), self.shard_size)

    def file(self, shard: range, ending: str) -> Path:
        """File of a shard: its samples (``parquet``), its record (``json``) or its sums (``safetensors``)."""
        return (self.samples if ending == "parquet" else self.records) / f"{shard.start:08d}.{ending}"

    def record(self, shard: range) -> dict[str, Any] | None:
        """Record of a shard, None if there is none.

        ``run`` (its fingerprint), ``first`` index, samples ``requested``, ``rows`` written, ``failed`` (a list of
        ``{index, step, reason}``), ``sha256`` and ``bytes`` of the table, ``sums_sha256`` (None without sums), ``seconds``,
        ``device``, ``host``, ``worker`` and the time ``written``.
        """
        path = self.file(shard, "json")
        try:
            record = json.loads(path.read_bytes())
            if record.pop("checksum") != sha256(canonical_json(record)):
                raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptedShardError(f"{path.name} cannot be read: {error}") from error
        # A record that was copied here with its files agrees with them.
        if record["first"] != shard.start:
            raise CorruptedShardError(f"{path.name} is the record of the shard that starts at {record['first']}")
        if self.fingerprint not in (None, record["run"]):
            raise CorruptedShardError(f"{path.name} is the record of another run")
        return record

    def readable_records(self) -> Iterator[dict[str, Any]]:
        """Records of the shards that have one, without the corrupted ones."""
        for shard in self.shards():
            with contextlib.suppress(CorruptedShardError):
                if (record := self.record(shard)) is not None:
                    yield record

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
                self._read_verified(path, record["sha256"])
            if record["sums_sha256"] is not None:
                path = self.file(shard, "safetensors")
                self._read_verified(path, record["sums_sha256"])
        except FileNotFoundError as error:
            raise CorruptedShardError(f"{path.name} is missing") from error
        return record

    @staticmethod
    def _read_verified(path: Path, checksum: str) -> bytes:
        data = path.read_bytes()
        if sha256(data) != checksum:
            raise CorruptedShardError(f"{path.name} is not what was written: its checksum is wrong")
        return data

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
        with self.space_for(path, len(data)), atomic_write(path, self.worker) as file:
            file.write(data)

    @contextlib.contextmanager
    def space_for(self, path: Path, size: int) -> Iterator[None]:
        """Turn the error of a full file system into a StoppedError that says how many bytes are missing."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            disk, done = os.statvfs(self.path), sum(1 for _ in self.readable_records())
            left = len(self.shards()) - done
            files = (file for folder in (self.samples, self.records) for file in folder.glob("*"))
            used = sum(file.stat().st_blocks * 512 for file in files)
            more = max(size, used // done if done else 0) * left
            raise StoppedError(
                f"{self.path} is full, or its quota is used up: {path.name} needs {size:,} bytes, "
                f"{disk.f_bavail * disk.f_frsize:,} are free. {done} complete shards are kept. Free disk space (about "
                f"{more:,} bytes for the remaining {left}) and re-run to resume"
            ) from error
