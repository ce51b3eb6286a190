"""The folder of a sampling run, which any number of workers share."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as save_arrays

from calib_guidance.backend.atomic import create, link_or_copy, sync_folder
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.claims import Claims, is_alive, new_worker
from calib_guidance.runs.identity import FORMAT, differences, read_run
from calib_guidance.runs.store import CorruptedShardError, ShardStore, canonical_json, readable_json, sha256


class ShardState(NamedTuple):
    """State of a shard.

    Attributes:
        name: ``done``, ``claimed`` (by a worker that may be alive), ``open`` or ``corrupted``.
        reason: why it is not done; who has claimed it.
    """

    name: str
    reason: str = ""


class RunFolder(ShardStore):
    """Shards that are complete or absent, and the claims of the workers that make them.

    Workers may know nothing of each other: they claim shards through files in the same folder.

    Args:
        path: the folder; it is made when something is written.
        shard_size: samples per shard.
        num_requests: samples of the run.
        lease: seconds after which a worker that did not renew its claim is dead.
    """

    def __init__(self, path: str | os.PathLike[str], shard_size: int, num_requests: int, lease: float = 600.0):
        super().__init__(path, shard_size, num_requests, new_worker())
        self.claims = Claims(self.path / "claims", self.worker, lease)

    @classmethod
    def open(cls, path: str | os.PathLike[str], lease: float = 600.0) -> RunFolder:
        """The folder of an existing run, with all samples that were ever requested."""
        run = read_run(path)
        if run is None:
            raise ConfigurationError(f"{path} holds no run: there is no run.json in it")
        folder = cls(path, run["shard_size"], run["num_samples"], lease)
        folder.fingerprint = run["fingerprint"]
        return folder

    def extended(self) -> RunFolder:
        """The folder with all samples that were ever requested of it."""
        return RunFolder.open(self.path, self.claims.lease)

    def check_readable(self) -> None:
        """Raise ConfigurationError for samples without a run.json."""
        found = [*self.samples.glob("*.parquet"), *self.records.glob("*.json")]
        if read_run(self.path) is None and found:
            raise ConfigurationError(
                f"{self.path} holds {len(found)} files of samples ({found[0].name} …) and no run.json that says what made "
                "them: set trainer.default_root_dir to another folder, or the SampleWriter's restart to true to remove them"
            )

    def begin(self, identity: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Start the run, resume it, or extend it to more samples.

        Nothing is written if the folder holds another run, or samples without a run.json.

        Args:
            identity: everything that pixels and labels are a function of, flat, in JSON's types.
            versions: of the software, for people.
        """
        self.check_readable()
        file = self.path / "run.json"
        if not file.exists():
            content = {
                "format": FORMAT,
                "fingerprint": sha256(canonical_json(identity)),
                "identity": identity,
                "shard_size": self.shard_size,
                "num_samples": self.num_requests,
                "versions": versions,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self.path.mkdir(parents=True, exist_ok=True)
            # Of workers that start at the same time one creates it, and the others compare.
            create(file, readable_json(content), self.worker)
            sync_folder(self.path)
        run = read_run(self.path)
        if different := differences(run, identity, self.shard_size):
            listed = "".join(f"\n  {line}" for line in different)
            raise ConfigurationError(
                f"{self.path} holds the samples of another configuration:{listed}\nset trainer.default_root_dir to another "
                "folder, or the SampleWriter's restart to true to remove that run"
            )
        self.fingerprint = run["fingerprint"]
        if run["num_samples"] < self.num_requests:
            self.put(file, readable_json(run | {"num_samples": self.num_requests}))
        for folder in (self.samples, self.records, self.claims.folder):
            folder.mkdir(exist_ok=True)
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove what killed workers left: unfinished files, and claims of shards that are done."""
        now = self.claims.now()
        for folder in (self.path, self.samples, self.records, self.claims.folder):
            for path in folder.glob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):  # another worker removes it too
                    alive = is_alive(path.name.rsplit(".", 2)[1])
                    if alive is False or (alive is None and now - path.stat().st_mtime > self.claims.lease):
                        path.unlink()
        for shard in self.shards():
            claim = self.claims.of(shard)
            if claim is not None and claim.alive is False and self.state(shard).name == "done":
                self.claims.path(shard).unlink(missing_ok=True)

    @classmethod
    def begin_with(cls, path: str | os.PathLike[str], other: str | os.PathLike[str], num_samples: int) -> None:
        """Start a run in ``path`` with the shards that another folder, if it holds a run, has of the same samples.

        Files are shared on file systems with hard links: shards are replaced and never written into. :meth:`begin` checks that
        both runs have the same identity.
        """
        if (run := read_run(other)) is None:
            return
        there, here = cls.open(other), cls(path, run["shard_size"], num_samples)
        here.path.mkdir(parents=True, exist_ok=True)
        create(here.path / "run.json", readable_json(run | {"num_samples": num_samples}), here.worker)
        if read_run(path)["fingerprint"] != run["fingerprint"]:
            return
        for folder in (here.samples, here.records):
            folder.mkdir(exist_ok=True)
        same = set(there.shards())
        for shard in here.shards():
            if shard not in same or here.file(shard, "json").exists() or there.state(shard, verify=True).name != "done":
                continue
            for ending in ("parquet", "safetensors", "json"):  # the record last: a shard with one is done
                if (source := there.file(shard, ending)).exists():
                    link_or_copy(source, here.file(shard, ending), here.worker)

    def remove(self) -> None:
        """Remove the run and its samples, unless a worker makes samples of it."""
        for path in sorted(path for path in self.claims.folder.glob("*") if path.name.isdecimal()):
            claim = self.claims.of(range(int(path.name), int(path.name) + 1))
            if claim is not None and claim.alive is not False:
                raise ConfigurationError(
                    f"{self.path} cannot be restarted: process {claim.pid} on {claim.host} works on it since {claim.since}"
                )
        # Records first: at no time does a record name samples that are gone.
        for folder, kinds in {self.records: "*", self.claims.folder: "*", self.samples: "*.parquet"}.items():
            for path in folder.glob(kinds):
                if not path.is_dir():
                    path.unlink(missing_ok=True)
        (self.path / "run.json").unlink(missing_ok=True)

    def state(self, shard: range, verify: bool = False) -> ShardState:
        """State of a shard; ``verify`` also reads the table and compares its checksum."""
        record, problem = None, None
        try:
            record = self.check(shard, verify)
        except CorruptedShardError as error:
            problem = ShardState("corrupted", str(error))
        if record is not None and record["requested"] >= len(shard):
            return ShardState("done")
        claim = self.claims.of(shard)
        if claim is not None and claim.alive is not False:
            return ShardState("claimed", f"process {claim.pid} on {claim.host} since {claim.since}")
        if problem is not None:
            return problem
        if record is not None:
            made = f"made with {record['requested']} of the {len(shard)} samples that are requested now"
            return ShardState("open", made)
        return ShardState("open", "not made yet" if claim is None else f"process {claim.pid} on {claim.host} died")

    def done(self, verify: bool = False) -> tuple[list[range], str]:
        """Shards that are done, and what there is to say of the others; empty for a complete run."""
        states = {shard: self.state(shard, verify) for shard in self.shards()}
        missing = {shard: state for shard, state in states.items() if state.name != "done"}
        if not missing:
            return list(states), ""
        first, why = next(iter(missing.items()))
        return [shard for shard in states if shard not in missing], (
            f"is not complete: {sum(map(len, missing))} of {self.num_requests} samples are missing or corrupted, "
            f"the first in {first.start}–{first[-1]} ({why.reason or why.name}). Re-run predict to complete them"
        )

    def remaining(self, verify: bool = False) -> list[range]:
        """Shards that are not done, whether claimed or not."""
        return [shard for shard in self.shards() if self.state(shard, verify).name != "done"]

    def foreign(self) -> list[Path]:
        """Files in the folders of samples, records and claims that belong to no shard."""
        run = read_run(self.path)
        count = max(self.num_requests, run["num_samples"] if run else 0)
        endings = {self.samples: {".parquet"}, self.records: {".json", ".safetensors"}, self.claims.folder: {None}}
        found = []
        for folder, known in endings.items():
            for path in sorted(folder.glob("*")):
                if path.name.startswith("."):
                    continue  # being written, left by a kill and removed by the next run, or the file system's own (.nfs…)
                match = re.fullmatch(r"(\d{8,})(\.\w+)?", path.name)
                first = int(match[1]) if match and match[2] in known else count
                if first % self.shard_size or first >= count:
                    found.append(path)
        return found

    def write(
        self,
        shard: range,
        table: pa.Table,
        sums: Mapping[str, np.ndarray] | None = None,
        failed: Sequence[Mapping[str, Any]] = (),
        seconds: float = 0.0,
        device: str = "",
    ) -> bool:
        """Write a shard that this worker has claimed, and give up the claim.

        Args:
            shard: one of :meth:`shards`; on a full file system it is not done, and the claim is kept.
            table: its samples in order of ``index``.
            sums: arrays that measurements keep of it.
            failed: ``{index, step, reason}`` of samples that are not in the table.
            seconds: that its samples took.
            device: that made them.

        Returns:
            Whether it was written. False if another worker has reclaimed the shard: that worker writes it.
        """
        if not self.claims.holds(shard):
            return False
        indices = sorted([*table["index"].to_pylist(), *(sample["index"] for sample in failed)])
        if indices != list(shard):
            raise ValueError(f"expected the samples of {shard}, got {indices}")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        self.put(self.file(shard, "parquet"), data)
        encoded = save_arrays({name: np.ascontiguousarray(array) for name, array in sums.items()}) if sums else None
        if encoded is not None:
            self.put(self.file(shard, "safetensors"), encoded)
        record = {
            "run": self.fingerprint,
            "first": shard.start,
            "requested": len(shard),
            "rows": table.num_rows,
            "failed": list(failed),
            "sha256": sha256(data),
            "bytes": len(data),
            "sums_sha256": None if encoded is None else sha256(encoded),
            "seconds": seconds,
            "device": device,
            "host": socket.gethostname(),
            "worker": self.worker,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record["checksum"] = sha256(canonical_json(record))
        self.put(self.file(shard, "json"), readable_json(record))
        self.claims.release(shard)
        return True

    def take(self, remaining: Sequence[range] | None = None) -> Iterator[range]:
        """Claimed shards for this worker, one after the other, until all are done or claimed by others.

        A single worker takes them in order; after another worker's claim it continues at a random shard. ``remaining`` is the
        result of :meth:`remaining`, if it is known already.
        """
        todo = deque(self.remaining(verify=True) if remaining is None else remaining)
        while todo:
            shard = todo.popleft()
            if self._claim(shard):
                yield shard
            elif todo and self.state(shard).name != "done":
                todo.rotate(random.randrange(len(todo)))

    def _claim(self, shard: range) -> bool:
        """Claim a shard that is not done."""
        with self.space_for(self.claims.path(shard), 1):
            if not self.claims.acquire(shard):
                return False
        if self.state(shard, verify=True).name == "done":  # made by another worker meanwhile
            self.claims.release(shard)
            return False
        return True

    def reclaim(self, poll: float = 1.0) -> Iterator[range]:
        """Claimed shards that dead workers left, for the time after :meth:`take`.

        Waits, ``poll`` seconds between looks, as long as a claim may belong to a dead worker, and not for workers that are
        seen to be alive.
        """
        waiting = {shard: self.claims.of(shard) for shard in self.remaining()}
        while waiting:
            for shard, first in list(waiting.items()):
                if self._claim(shard):
                    del waiting[shard]
                    yield shard
                    continue
                claim = self.claims.of(shard)
                alive = claim is not None and (claim.alive or (first is not None and claim.renewed > first.renewed))
                if alive or self.state(shard).name == "done":
                    del waiting[shard]
            if waiting:
                time.sleep(min(poll, self.claims.lease / 10))
