"""The folder of a sampling run, which any number of workers share."""

import contextlib
import os
import random
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as save_arrays

from calib_guidance.backend.atomic import create, link_or_copy, new_worker, remove_abandoned, sync_folder
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import identity as identities
from calib_guidance.runs.claims import Claim, Claims
from calib_guidance.runs.identity import read_run
from calib_guidance.runs.integrity import canonical_json, checked_json, sha256
from calib_guidance.runs.store import REAL_IMAGES, CorruptedShardError, ShardStore

# What a run writes beside its shards, by folder; evaluation/ is that of `evaluate`.
_PLOTS = (
    "samples",
    "trajectory",
    "ece_t",
    "reliability",
    "gradient_norm",
    "guidance_schedule",
    "guidance_grid",
    "clip_score",
)
_REPORT = ("metrics.json", "predictions.npz", "trajectory.npz", "guidance_grid.npz", REAL_IMAGES)
_REPORT += tuple(f"plots/{stem}{ending}" for stem in _PLOTS for ending in (".png", ".pdf"))
_REPORT += ("plots/animation.gif",)
_NAME = re.compile(r"(\d{8,})((?:\.\w+)?)")
_BESIDE = (
    *_REPORT,
    "config.yaml",
    *(f"evaluation/{name}" for name in ("metrics.json", "metrics.md", "predictions.npz", REAL_IMAGES)),
)


class ShardState(NamedTuple):
    """State of a shard."""

    name: str  # "done", "claimed" (by a worker that may be alive), "open" or "corrupted"
    reason: str = ""  # why it is not done; who has claimed it


class RunFolder(ShardStore):
    """Shards that are complete or absent, and the claims of the workers that make them.

    Workers may know nothing of each other: they claim shards through files in the same folder, which is made when something is
    written. A worker that did not renew its claim for ``lease`` seconds is dead.
    """

    def __init__(self, path: str | os.PathLike[str], shard_size: int, num_requests: int, lease: float = 600.0):
        super().__init__(path, shard_size, num_requests, new_worker())
        self.claims = Claims(self.path / "claims", self.worker, lease)

    @classmethod
    def open(cls, path: str | os.PathLike[str], lease: float = 600.0) -> Self:
        """The folder of an existing run, with all samples that were ever requested."""
        run = read_run(path)
        if run is None:
            raise ConfigurationError(f"{path} holds no run: there is no run.json in it")
        folder = cls(path, run["shard_size"], run["num_samples"], lease)
        folder.fingerprint = run["fingerprint"]
        return folder

    def rename_worker(self) -> None:
        """Take a new name, in a process that was forked. Its claims are those that it makes from now on."""
        self.worker = new_worker()
        self.claims = Claims(self.claims.folder, self.worker, self.claims.lease)

    def extended(self) -> Self:
        """The folder with all samples that were ever requested of it."""
        return self.open(self.path, self.claims.lease)

    def _entries(self) -> Iterator[tuple[Path, int | None]]:
        """What is in the folders of shards, records first, with the index that its shard starts at; None for others' names."""
        endings = {self.records: (".json", ".safetensors"), self.claims.folder: ("",), self.samples: (".parquet",)}
        for folder, known in endings.items():
            for path in sorted(folder.glob("[!.]*")):  # hidden ones are being written, or the file system's own (.nfs…)
                match = _NAME.fullmatch(path.name)
                yield path, int(match[1]) if match and match[2] in known else None

    def check_readable(self) -> None:
        """Raise ConfigurationError for samples without a run.json."""
        # Looked for before run.json is: another worker may write both in between.
        found = [path for path, _ in self._entries() if path.suffix in (".json", ".parquet")]
        if read_run(self.path) is None and found:
            raise ConfigurationError(
                f"{self.path} holds {len(found)} files of samples ({found[0].name} …) and no run.json that says what made "
                "them: set trainer.default_root_dir to another folder, or the SampleWriter's restart to true to remove those "
                "that have a record"
            )

    def begin(self, identity: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Start the run, resume it, or change its number of samples: to fewer only while no worker is alive.

        Nothing is written if the folder holds another run, or samples without a run.json. ``identity`` is everything that pixels
        and labels are a function of, flat, in JSON's types; ``versions`` of the software are for people.
        """
        self.check_readable()
        identities.check_size(self.num_requests, self.shard_size)
        file = self.path / "run.json"
        if not file.exists():
            content = {
                "format": identities.FORMAT,
                "fingerprint": sha256(canonical_json(identity)),
                "identity": identity,
                "shard_size": self.shard_size,
                "num_samples": self.num_requests,
                "versions": versions,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self.path.mkdir(parents=True, exist_ok=True)
            # Of workers that start at the same time one creates it, and the others compare.
            create(file, checked_json(content))
            sync_folder(self.path)
        run = read_run(self.path)
        if different := identities.differences(run, identity, self.shard_size):
            listed = "".join(f"\n  {line}" for line in different)
            raise ConfigurationError(
                f"{self.path} holds the samples of another configuration:{listed}\nset trainer.default_root_dir to another "
                "folder, or the SampleWriter's restart to true to remove that run"
            )
        self.fingerprint = run["fingerprint"]
        more = self.num_requests - run["num_samples"]
        if more > 0 or (more < 0 and self._live_claim() is None):
            self.remove_report()  # it is of other samples
            self.put(file, checked_json(run | {"num_samples": self.num_requests}))
        for folder in (self.samples, self.records, self.claims.folder):
            folder.mkdir(exist_ok=True)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what killed workers left: unfinished files and folders, and claims of shards that are done."""
        now = self.claims.now()
        for folder in (self.path, self.samples, self.records, self.claims.folder, self.path / "plots"):
            remove_abandoned(folder, now, self.claims.lease)
        shards = {shard.start: shard for shard in self.shards()}
        for path, first, claim in self._claims():
            done = first not in shards or self.state(shards[first]).name == "done"
            if claim.alive is False and done and not path.is_dir():
                path.unlink(missing_ok=True)

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
        create(here.path / "run.json", checked_json(run | {"num_samples": num_samples}))
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
                    link_or_copy(source, here.file(shard, ending))

    def _claims(self) -> Iterator[tuple[Path, int, Claim]]:
        """Claims of whatever shards: file, index that the shard starts at, and content."""
        for path, first in self._entries():
            of_shard = path.parent == self.claims.folder and first is not None
            if of_shard and (claim := self.claims.of(range(first, first + 1))) is not None:
                yield path, first, claim

    def _live_claim(self) -> Claim | None:
        """The claim of a worker that may be alive, of whatever shard."""
        return next((claim for _, _, claim in self._claims() if claim.alive is not False), None)

    def remove(self) -> str:
        """Remove the run, its samples, and what was measured of them, unless a worker makes samples of it.

        Only files with names that a run writes, and nothing through a link. Without a run.json, only shards with a record.
        Returns what was removed, for people; empty if there was nothing.
        """
        if claim := self._live_claim():
            raise ConfigurationError(f"{self.path} cannot be restarted: {claim} works on it since {claim.since}")
        folders = (self.records, self.claims.folder, self.samples, self.path / "plots", self.path / "evaluation")
        if linked := [str(folder) for folder in folders if folder.is_symlink()]:
            raise ConfigurationError(
                f"{linked[0]} is a link, and restart removes nothing through links: remove it, or set "
                "trainer.default_root_dir to another folder"
            )
        known = os.path.lexists(self.path / "run.json")
        entries = [(path, first) for path, first in self._entries() if first is not None]
        records = {first for _, first in entries if known or self.readable_record(range(first, first + 1))}
        # Records first: at no time does a record name samples that are gone.
        removed = self._unlink(path for path, first in entries if first in records)
        if removed or known:
            removed += self._unlink(self.path / name for name in (*_BESIDE, "run.json"))
        counts = Counter(path.relative_to(self.path).parts[0] for path in removed)
        return ", ".join(name if "." in name else f"{name} ({n})" for name, n in counts.items())

    def remove_report(self) -> None:
        """Remove the metrics and plots of an earlier report, which is of other samples."""
        self._unlink(self.path / name for name in _REPORT)

    def _unlink(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the files that were there and are removed; folders that are empty then go too."""
        found = [path for path in paths if path.is_file() or path.is_symlink()]
        for path in found:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in found} - {self.path, self.samples, self.records, self.claims.folder}:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return found

    def state(self, shard: range, verify: bool = False) -> ShardState:
        """State of a shard; ``verify`` also reads the table and compares its checksum."""
        record, problem = None, None
        try:
            record = self.check(shard, verify)
        except CorruptedShardError as error:
            problem = ShardState("corrupted", str(error))
        if record is not None and record["requested"] == len(shard):
            return ShardState("done")
        claim, reason = self.claims.of(shard), "not made yet"
        if claim is not None and claim.alive is not False:
            return ShardState("claimed", f"{claim} since {claim.since}")
        if record is not None:
            reason = f"made with {record['requested']} samples, and {len(shard)} are requested now"
        elif claim is not None:
            reason = f"{claim} died" if claim.worker else "its claim is damaged"
        return problem or ShardState("open", reason)

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

    def surplus(self) -> list[range]:
        """Shards beyond the samples that are requested now, of a run that was larger: they are kept, and not counted."""
        found: list[range] = []
        for path, first in self._entries():
            if path.suffix == ".json" and first is not None and first >= self.num_requests:
                record = self.readable_record(range(first, first + self.shard_size))
                found += [range(first, first + record["requested"])] if record is not None else []
        return found

    def foreign(self) -> list[Path]:
        """Files in the folders of samples, records and claims that belong to no shard."""
        run = read_run(self.path)
        count = max(self.num_requests, run["num_samples"] if run else 0)
        known = {shard.start for shard in self.surplus()} | set(range(0, count, self.shard_size))
        return [path for path, first in self._entries() if first not in known]

    def write(
        self,
        shard: range,
        table: pa.Table,
        sums: Mapping[str, np.ndarray] | None = None,
        failed: Sequence[Mapping[str, Any]] = (),
        seconds: float = 0.0,
        device: str = "",
    ) -> bool:
        """Write a claimed shard, and give up the claim; False if another worker has reclaimed the shard, and writes it.

        On a full file system it is not done, and the claim is kept. The samples of ``table`` are in order of ``index``; those
        that are not in it are ``failed``, ``{index, step, reason}``. ``sums`` are arrays that measurements keep.
        """
        with self.stopping(self.claims.path(shard), 1):
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
        self.put(self.file(shard, "json"), checked_json(record))
        self.claims.release(shard)
        return True

    def take(self, remaining: Sequence[range] | None = None) -> Iterator[range]:
        """Claimed shards for this worker, one after the other, until all are done or claimed by others.

        A single worker takes them in order; after another worker's claim it continues at a random shard.
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
        with self.stopping(self.claims.path(shard), 1):
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
