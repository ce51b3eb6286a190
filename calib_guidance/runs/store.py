"""The folder of a sampling run: shards that are there whole or not at all, and who works on which.

A run is cut into shards of consecutive sample indices. Of each there is a table of samples, and a record that is written last:
what has a record is done. Workers, which may know nothing of each other, claim shards by files in the same folder.

::

    FOLDER/
      run.json                     identity (all that samples are a function of), shard size, how many were asked for
      samples/00000000.parquet     the samples of the shard that begins at that index; their bytes depend on nothing else
      shards/00000000.json         its record: checksums, rows, what was left out, how long it took, who made it
      shards/00000000.safetensors  sums over the shard, and rows of samples, that measurements keep, where they do
      claims/00000000              somebody works on it; the file's age says whether they still do

This module needs neither torch nor Lightning: looking at a folder takes no longer than reading it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from calib_guidance.errors import ConfigurationError, RunError, StoppedError

FORMAT = 1
_UNSET = "(not set)"


class ShardState(NamedTuple):
    """Where a shard stands.

    Attributes:
        name: ``done``, ``claimed`` (a worker that may be alive has it), ``open`` or ``damaged``.
        reason: of anything but done, for people; who has it, where it is claimed.
    """

    name: str
    reason: str = ""


class Claim(NamedTuple):
    """Somebody's claim of a shard.

    Attributes:
        worker: unique name of the worker.
        host: its machine.
        pid: its process there.
        since: when the claim was made, ISO 8601.
        renewed: when it was last renewed, seconds since the epoch on the file system's clock.
        alive: True or False where that can be known, None within its lease on another machine.
    """

    worker: str
    host: str
    pid: int
    since: str
    renewed: float
    alive: bool | None


class DamagedShardError(RunError):
    """A shard that has a record, and files that disagree with it."""


@functools.cache
def _place() -> str:
    """Eight hex digits, equal where processes can look each other up by number: one machine, boot and process namespace."""
    words = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            words.append(os.readlink(path) if "ns" in path else Path(path).read_text())
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None where there is no such process, or a dead one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in "ZX" else stat[19]


def _alive(worker: str) -> bool | None:
    """Whether the process of a worker's name runs; None where that cannot be seen from here."""
    place, pid, started, _ = worker.split("-")
    return _started(int(pid)) == started if place == _place() and started != "None" else None


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_table(data: bytes | str | os.PathLike[str], indices: Collection[int] | None = None) -> dict[str, np.ndarray]:
    """A parquet file of samples.

    Args:
        data: the file's path or its bytes.
        indices: of the samples to decode; None for all of the file.

    Returns:
        ``image`` uint8 ``(N, C, H, W)`` and every other column ``(N,)`` int64: ``index``, ``label``, ``seed`` …
    """
    table = pq.read_table(io.BytesIO(data) if isinstance(data, bytes) else data)
    if indices is not None:
        table = table.filter(np.isin(table["index"], list(indices)))
    table = table.to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table.pop("image")]
    images = [image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in pixels]
    columns = {name: np.asarray(column, dtype=np.int64) for name, column in table.items()}
    return {"image": np.stack(images) if images else np.zeros((0, 0, 0, 0), np.uint8), **columns}


class RunFolder:
    """The folder of a sampling run.

    Args:
        path: the folder; it is made when something is written.
        shard_size: samples per shard.
        num_requests: samples that are asked for.
        lease: seconds after which a claim that was not renewed is that of a dead worker. On the worker's own machine a dead
            process is found at once.

    Attributes:
        fingerprint: of the run that this folder was begun or opened as; records of another do not count. None before.
        worker: unique name of this worker.
    """

    def __init__(self, path: str | os.PathLike[str], shard_size: int, num_requests: int, lease: float = 600.0):
        self.path, self.shard_size, self.num_requests, self.lease = Path(path), shard_size, num_requests, lease
        self.samples, self.records, self.claims = (self.path / name for name in ("samples", "shards", "claims"))
        self.worker = f"{_place()}-{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:8]}"
        self.fingerprint: str | None = None
        self._held: dict[int, range] = {}
        self._renewed = time.monotonic()

    @classmethod
    def open(cls, path: str | os.PathLike[str], lease: float = 600.0) -> RunFolder:
        """The folder of an earlier run, with all that was ever asked of it.

        Raises:
            ConfigurationError: no run has been there, or its run.json cannot be read.
        """
        run = cls.read_run(path)
        if run is None:
            raise ConfigurationError(f"{path} holds no run: there is no run.json in it")
        folder = cls(path, run["shard_size"], run["num_samples"], lease)
        folder.fingerprint = run["fingerprint"]
        return folder

    @staticmethod
    def read_run(path: str | os.PathLike[str]) -> dict[str, Any] | None:
        """run.json of a folder: ``format``, ``fingerprint``, ``identity``, ``shard_size``, ``num_samples``, ``versions``,
        ``created``; None where there is none.

        Raises:
            ConfigurationError: it cannot be read.
        """
        file = Path(path, "run.json")
        try:
            run = json.loads(file.read_bytes())
            if run["format"] != FORMAT:
                raise ConfigurationError(
                    f"{file} has format {run['format']}, this version of calib_guidance reads {FORMAT}"
                )
            if run["fingerprint"] != _sha256(_canonical(run["identity"])):
                raise ValueError("its fingerprint is not that of its identity")
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"{file} is damaged ({error}): restore it, or choose another folder (trainer.default_root_dir)"
            ) from error
        return run

    # The run as a whole

    def whole(self) -> RunFolder:
        """The folder with all that was ever asked of it."""
        return RunFolder.open(self.path, self.lease)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Where the run that is in the folder differs from ``identity`` and from the shard size, ``key: then, now`` each."""
        run = self.read_run(self.path)
        if run is None:
            return []
        then = run["identity"] | {"shard_size": run["shard_size"]}
        now = json.loads(_canonical(identity)) | {"shard_size": self.shard_size}
        return [
            f"{key}: {then.get(key, _UNSET)} in the folder, now {now.get(key, _UNSET)}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key, _UNSET) != now.get(key, _UNSET)
        ]

    def check_readable(self) -> None:
        """Raise ConfigurationError where there are samples of which nobody knows what made them."""
        found = [*self.samples.glob("*.parquet"), *self.records.glob("*.json")]
        if self.read_run(self.path) is None and found:
            raise ConfigurationError(
                f"{self.path} holds {len(found)} files of samples ({found[0].name} …) and no run.json that says what made "
                "them: set trainer.default_root_dir to another folder, or the SampleWriter's restart to true to remove them"
            )

    def begin(self, identity: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Begin the run, or go on with it, or with more samples.

        Args:
            identity: all that pixels and labels are a function of, flat, in JSON's types.
            versions: of the software, for people.

        Raises:
            ConfigurationError: the folder holds another run, or samples of none. Nothing has been written.
        """
        self.check_readable()
        if not (self.path / "run.json").exists():
            content = {
                "format": FORMAT,
                "fingerprint": _sha256(_canonical(identity)),
                "identity": identity,
                "shard_size": self.shard_size,
                "num_samples": self.num_requests,
                "versions": versions,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self.path.mkdir(parents=True, exist_ok=True)
            # Of workers that begin at the same time one creates it, and the others compare.
            self._create(self.path / "run.json", json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
            _sync(self.path)
        if different := self.differences(identity):
            listed = "".join(f"\n  {line}" for line in different)
            raise ConfigurationError(
                f"{self.path} holds the samples of another configuration:{listed}\nset trainer.default_root_dir to another "
                "folder, or the SampleWriter's restart to true to remove that run"
            )
        run = self.read_run(self.path)
        self.fingerprint = run["fingerprint"]
        if run["num_samples"] < self.num_requests:
            run["num_samples"] = self.num_requests
            self._replace(self.path / "run.json", json.dumps(run, indent=1, ensure_ascii=False).encode() + b"\n")
        for folder in (self.samples, self.records, self.claims):
            folder.mkdir(exist_ok=True)
        self._tidy()

    @classmethod
    def begin_with(cls, path: str | os.PathLike[str], other: str | os.PathLike[str], num_samples: int) -> None:
        """Begin a run with the shards that another folder has of the same samples, more or fewer of them; none is made twice.

        The files are shared where the file system has hard links: shards are replaced as a whole and never written into. Whether
        the runs are the same is looked at when the run goes on, see :meth:`begin`.

        Args:
            path: folder of the run that begins, or was begun in this way.
            other: folder of the other run; where there is none yet, nothing is done.
            num_samples: that the run asks for.
        """
        if (run := cls.read_run(other)) is None:
            return
        there = cls.open(other)
        here = cls(path, run["shard_size"], num_samples)
        here.path.mkdir(parents=True, exist_ok=True)
        content = json.dumps(run | {"num_samples": num_samples}, indent=1, ensure_ascii=False).encode() + b"\n"
        here._create(here.path / "run.json", content)
        if cls.read_run(path)["fingerprint"] != run["fingerprint"]:
            return
        for folder in (here.samples, here.records):
            folder.mkdir(exist_ok=True)
        same = set(there.shards())
        for shard in here.shards():
            if shard not in same or here._record_path(shard).exists() or there.state(shard, verify=True).name != "done":
                continue
            for name in ("table_path", "_sums_path", "_record_path"):  # the record last: what has one is done
                source, target = (getattr(run_folder, name)(shard) for run_folder in (there, here))
                if source.exists():
                    here._share(source, target)

    def _share(self, source: Path, target: Path) -> None:
        """Put a file of another folder into this one, whole or not at all."""
        temporary = self._temporary(target)
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)

    def _tidy(self) -> None:
        """Remove what workers that were killed left: unfinished files, and claims of what is done."""
        now = self._now()
        for path in (p for f in (self.path, self.samples, self.records, self.claims) for p in f.glob(".*.tmp")):
            worker = path.name.rsplit(".", 2)[1]
            with contextlib.suppress(FileNotFoundError):  # another worker tidies too
                alive = _alive(worker) if worker.count("-") == 3 else None
                if alive is False or (alive is None and now - path.stat().st_mtime > self.lease):
                    path.unlink()
        for shard in self.shards():
            claim = self.claim_of(shard)
            if claim is not None and claim.alive is False and self.state(shard).name == "done":
                self._claim_path(shard).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the run, with its samples.

        Raises:
            ConfigurationError: somebody works on it.
        """
        for path in sorted(path for path in self.claims.glob("*") if path.name.isdecimal()):
            claim = self.claim_of(range(int(path.name), int(path.name) + 1))
            if claim is not None and claim.alive is not False:
                raise ConfigurationError(
                    f"{self.path} cannot be begun anew: process {claim.pid} on {claim.host} works on it since {claim.since}"
                )
        # Records first: at no time is something said to be there that is not.
        for folder, kinds in {self.records: "*", self.claims: "*", self.samples: "*.parquet"}.items():
            for path in folder.glob(kinds):
                if not path.is_dir():
                    path.unlink(missing_ok=True)
        (self.path / "run.json").unlink(missing_ok=True)

    # Shards

    def shards(self) -> list[range]:
        """Indices of every shard, in order; the last may be short."""
        starts = range(0, self.num_requests, self.shard_size)
        return [range(start, min(start + self.shard_size, self.num_requests)) for start in starts]

    def table_path(self, shard: range) -> Path:
        """Where the samples of a shard are, or will be."""
        return self.samples / f"{shard.start:08d}.parquet"

    def _record_path(self, shard: range) -> Path:
        return self.records / f"{shard.start:08d}.json"

    def _sums_path(self, shard: range) -> Path:
        return self.records / f"{shard.start:08d}.safetensors"

    def _claim_path(self, shard: range) -> Path:
        return self.claims / f"{shard.start:08d}"

    def record(self, shard: range) -> dict[str, Any] | None:
        """The record of a shard, None where there is none.

        Returns:
            ``run`` (its fingerprint), ``first`` index, samples ``requested``, ``rows`` written, ``left_out`` (a list of
            ``{index, step, reason}``), ``sha256`` and ``bytes`` of the table, ``sums_sha256`` (None where there are none),
            ``seconds``, ``device``, ``host``, ``worker`` and the time ``written``.

        Raises:
            DamagedShardError: it cannot be read, or is that of another shard or run.
        """
        path = self._record_path(shard)
        try:
            record = json.loads(path.read_bytes())
            if record.pop("checksum") != _sha256(_canonical(record)):
                raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(f"{path.name} cannot be read: {error}") from error
        # Copied here with its files, it would agree with them.
        if record["first"] != shard.start:
            raise DamagedShardError(f"{path.name} is the record of the shard that begins at {record['first']}")
        if self.fingerprint not in (None, record.get("run", self.fingerprint)):  # early runs did not note it
            raise DamagedShardError(f"{path.name} is the record of another run")
        return record

    def state(self, shard: range, verify: bool = False) -> ShardState:
        """Where a shard stands.

        Args:
            shard: of :meth:`shards`.
            verify: also compare the checksums of its files, which are read for it.
        """
        try:
            record = self.record(shard)
            if record is not None:
                self._check(shard, record, verify)
            problem = None
        except DamagedShardError as error:
            record, problem = None, ShardState("damaged", str(error))
        if record is not None and record["requested"] >= len(shard):
            return ShardState("done")
        claim = self.claim_of(shard)
        if claim is not None and claim.alive is not False:
            return ShardState("claimed", f"process {claim.pid} on {claim.host} since {claim.since}")
        if problem is not None:
            return problem
        if record is not None:
            return ShardState(
                "open", f"made with {record['requested']} of the {len(shard)} samples that are asked for now"
            )
        return ShardState("open", "not made yet" if claim is None else f"process {claim.pid} on {claim.host} died")

    def _check(self, shard: range, record: Mapping[str, Any], verify: bool) -> None:
        """Raise DamagedShardError where the files of a shard disagree with its record."""
        try:
            path = self.table_path(shard)
            if (size := path.stat().st_size) != record["bytes"]:
                raise DamagedShardError(f"{path.name} has {size} bytes, its record says {record['bytes']}")
            if verify and _sha256(path.read_bytes()) != record["sha256"]:
                raise DamagedShardError(f"{path.name} is not what was written: its checksum is wrong")
            if record["sums_sha256"] is not None:
                path = self._sums_path(shard)
                if _sha256(path.read_bytes()) != record["sums_sha256"]:  # small
                    raise DamagedShardError(f"{path.name} is not what was written: its checksum is wrong")
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path.name} is missing") from error

    def remaining(self, verify: bool = False) -> list[range]:
        """The shards that are not done, whether claimed or not."""
        return [shard for shard in self.shards() if self.state(shard, verify).name != "done"]

    def left_out(self) -> list[dict[str, Any]]:
        """``{index, step, reason}`` of all samples that the records name as left out."""
        records = (self._readable(shard) for shard in self.shards())
        return [sample for record in records if record is not None for sample in record["left_out"]]

    def read(self, shard: range, indices: Collection[int] | None = None) -> dict[str, np.ndarray]:
        """The samples of a shard that is done, or those of them with such an index, see :func:`read_table`.

        Raises:
            DamagedShardError: they are not what was written.
        """
        return read_table(self.read_bytes(shard), indices)

    def read_bytes(self, shard: range) -> bytes:
        """The parquet file of a shard that is done.

        Raises:
            DamagedShardError: it is not what was written.
        """
        record = self._checked(shard)
        data = self.table_path(shard).read_bytes()
        if _sha256(data) != record["sha256"]:
            raise DamagedShardError(f"{self.table_path(shard).name} is not what was written: its checksum is wrong")
        return data

    def read_sums(self, shard: range) -> dict[str, np.ndarray]:
        """What was given to :meth:`write` as sums of a shard that is done.

        Raises:
            DamagedShardError: they are not what was written.
        """
        record = self._checked(shard)
        return {} if record["sums_sha256"] is None else load_arrays(self._sums_path(shard).read_bytes())

    def _checked(self, shard: range) -> dict[str, Any]:
        """The record of a shard that is done, which its files agree with, but for the checksum of the table."""
        record = self.record(shard)
        if record is None:
            raise DamagedShardError(f"{self.table_path(shard).name} has no record")
        self._check(shard, record, verify=False)
        return record

    def foreign(self) -> list[Path]:
        """Files among those of the shards that belong to none of them."""
        run = self.read_run(self.path)
        count = max(self.num_requests, run["num_samples"] if run else 0)
        pattern = re.compile(r"(\d{8,})(\.\w+)?")
        endings = {self.samples: {".parquet"}, self.records: {".json", ".safetensors"}, self.claims: {None}}
        foreign = []
        for folder, known in endings.items():
            for path in sorted(folder.glob("*")):
                if path.name.startswith("."):
                    continue  # being written, left by a kill and tidied by the next run, or the file system's own (.nfs…)
                match = pattern.fullmatch(path.name)
                first = int(match[1]) if match and match[2] in known else None
                if first is None or first % self.shard_size or first >= count or path.name != match.string:
                    foreign.append(path)
        return foreign

    # Writing

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self.worker}.tmp")

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        """A file beside ``path`` with the data, forced to the disk; none where that fails."""
        temporary = self._temporary(path)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(path, len(data)) from error
            raise
        return temporary

    def _full(self, path: Path, needed: int) -> StoppedError:
        """What to say where the file system has no room for a file of ``needed`` bytes."""
        state, done = os.statvfs(self.path), sum(self._readable(shard) is not None for shard in self.shards())
        left = len(self.shards()) - done
        used = sum(path.stat().st_blocks * 512 for folder in (self.samples, self.records) for path in folder.glob("*"))
        more = max(needed, used // done if done else 0) * left
        return StoppedError(
            f"{self.path} is full, or its quota used up: {path.name} needs {needed:,} bytes, {state.f_bavail * state.f_frsize:,} "
            f"are free. {done} whole shards stay. Make room (about {more:,} bytes for the {left} that are left), and the same "
            "command goes on"
        )

    def _readable(self, shard: range) -> dict[str, Any] | None:
        with contextlib.suppress(DamagedShardError):
            return self.record(shard)
        return None

    def _replace(self, path: Path, data: bytes) -> None:
        """Put a file in its place, whole or not at all, whatever stops this process or the machine."""
        os.replace(self._write_temporary(path, data), path)
        _sync(path.parent)

    def _create(self, path: Path, data: bytes) -> bool:
        """Create a file that is never seen empty; False where it is there already. Of workers that try, one succeeds."""
        temporary = self._write_temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(path, "xb") as file:
                    try:
                        file.write(data)
                        file.flush()
                    except BaseException:  # an empty claim would be nobody's, for a whole lease
                        path.unlink()
                        raise
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def write(
        self,
        shard: range,
        table: pa.Table,
        sums: Mapping[str, np.ndarray] | None = None,
        left_out: Sequence[Mapping[str, Any]] = (),
        seconds: float = 0.0,
        device: str = "",
    ) -> bool:
        """Write a shard that this worker has claimed, and give back the claim.

        Args:
            shard: of :meth:`shards`.
            table: its samples in order of ``index``.
            sums: what measurements keep of it.
            left_out: ``{index, step, reason}`` of samples that are not in the table.
            seconds: that its samples took.
            device: that made them, in words.

        Returns:
            Whether it was written. It is not where another worker has taken over the claim: that one writes it.

        Raises:
            StoppedError: the file system is full.
            OSError: it refuses otherwise. Nothing of the shard counts in both cases, and the claim is kept.
            ValueError: the samples are not those of the shard, each once.
        """
        if not self.holds(shard):
            return False
        indices = sorted([*table["index"].to_pylist(), *(sample["index"] for sample in left_out)])
        if indices != list(shard):
            raise ValueError(f"the shard is that of {shard}, and the samples given are {indices}")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        self._replace(self.table_path(shard), data)
        encoded = save_arrays({name: np.ascontiguousarray(array) for name, array in sums.items()}) if sums else None
        if encoded is not None:
            self._replace(self._sums_path(shard), encoded)
        record = {
            "run": self.fingerprint,
            "first": shard.start,
            "requested": len(shard),
            "rows": table.num_rows,
            "left_out": list(left_out),
            "sha256": _sha256(data),
            "bytes": len(data),
            "sums_sha256": None if encoded is None else _sha256(encoded),
            "seconds": seconds,
            "device": device,
            "host": socket.gethostname(),
            "worker": self.worker,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record["checksum"] = _sha256(_canonical(record))
        self._replace(self._record_path(shard), json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        self.release(shard)
        return True

    # Claims

    def _now(self) -> float:
        """The file system's clock, which stamps claims: machines' own may differ."""
        probe = self._temporary(self.claims / "clock")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # a folder that may only be looked at
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    @staticmethod
    def _read_claim(path: Path) -> dict[str, Any] | None:
        """What is in a claim, None where there is none."""
        try:
            known = json.loads(path.read_bytes())
            return known if {"worker", "host", "pid", "since"} <= known.keys() else {}
        except FileNotFoundError:
            return None
        except (AttributeError, ValueError):  # damaged, or without hard links not yet written
            return {}

    def claim_of(self, shard: range) -> Claim | None:
        """Who has claimed a shard, None where nobody has."""
        path = self._claim_path(shard)
        known = self._read_claim(path)
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return None
        if not known:
            known = {"worker": "", "host": "an unknown machine", "pid": 0, "since": "an unknown time"}
        alive = _alive(known["worker"]) if known["worker"] else None
        if alive is not False and self._now() - renewed > self.lease:
            alive = False
        return Claim(known["worker"], known["host"], known["pid"], known["since"], renewed, alive)

    def holds(self, shard: range) -> bool:
        """Whether this worker has the shard."""
        claim = self._read_claim(self._claim_path(shard)) if shard.start in self._held else None
        return bool(claim) and claim["worker"] == self.worker

    def claim(self, shard: range) -> bool:
        """Claim a shard, or take it over from a dead worker; whether it is this worker's now."""
        path = self._claim_path(shard)
        claim = self.claim_of(shard)
        if claim is not None and (claim.alive is not False or not self._bury(path, claim)):
            return False
        content = {
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if not self._create(path, json.dumps(content).encode()):
            return False
        self._held[shard.start] = shard
        return True

    def _bury(self, path: Path, dead: Claim) -> bool:
        """Remove the claim of a dead worker; of workers that try, one succeeds."""
        grave = self._temporary(path)
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return False
        if (self._read_claim(grave) or {}).get("worker", "") == dead.worker:
            grave.unlink()
            return True
        # A quicker worker's, claimed since. It goes back; where that fails, what that worker makes is made once more.
        with contextlib.suppress(OSError):
            os.link(grave, path)
        grave.unlink()
        return False

    def renew(self) -> None:
        """Tell the others that this worker is alive; cheap, to be called often."""
        if time.monotonic() - self._renewed < self.lease / 20:
            return
        self._renewed = time.monotonic()
        for shard in list(self._held.values()):
            if self.holds(shard):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._claim_path(shard))
            else:
                self._held.pop(shard.start, None)  # written meanwhile, or taken over: this worker was thought dead

    def release(self, shard: range | None = None) -> None:
        """Give back the claim of a shard, or all claims of this worker."""
        for each in [shard] if shard is not None else list(self._held.values()):
            if self.holds(each):
                self._claim_path(each).unlink(missing_ok=True)
            self._held.pop(each.start, None)

    def take(self, remaining: Sequence[range] | None = None) -> Iterator[range]:
        """Shards for this worker to make, one after the other, claimed; ends when every one is done or claimed by others.

        Alone it goes in order; where it meets another worker's claim it goes on from a random place.

        Args:
            remaining: what :meth:`remaining` gave, where that has been asked already.
        """
        todo = deque(self.remaining(verify=True) if remaining is None else remaining)
        while todo:
            shard = todo.popleft()
            if self._take(shard):
                yield shard
            elif todo and self.state(shard).name != "done":
                todo.rotate(random.randrange(len(todo)))

    def _take(self, shard: range) -> bool:
        """Claim a shard that is to be made."""
        if not self.claim(shard):
            return False
        if self.state(shard, verify=True).name == "done":  # made by another meanwhile
            self.release(shard)
            return False
        return True

    def take_over(self, poll: float = 1.0) -> Iterator[range]:
        """Shards that other workers claimed and do not make, claimed; to be asked for when :meth:`take` has ended.

        Waits as long as a claim may be that of a dead worker, and not for workers that are seen to be alive.

        Args:
            poll: seconds between looks.
        """
        waiting = {shard: self.claim_of(shard) for shard in self.remaining()}
        while waiting:
            for shard, first in list(waiting.items()):
                if self._take(shard):
                    del waiting[shard]
                    yield shard
                    continue
                claim = self.claim_of(shard)
                alive = claim is not None and (claim.alive or (first is not None and claim.renewed > first.renewed))
                if alive or self.state(shard).name == "done":
                    del waiting[shard]
            if waiting:
                time.sleep(min(poll, self.lease / 10))
