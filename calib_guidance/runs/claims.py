"""Claims of shards: leases that workers renew while they are alive, as files in a folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from calib_guidance.backend.atomic import create, temporary_path


class Claim(NamedTuple):
    """A worker's claim of a shard."""

    worker: str
    host: str
    pid: int
    since: str  # ISO 8601
    renewed: float  # seconds since the epoch on the file system's clock
    alive: bool | None  # None within the lease of a worker on another machine


_UNREADABLE = {"worker": "", "host": "an unknown machine", "pid": 0, "since": "an unknown time"}  # stands for a claim


@functools.cache
def _machine() -> str:
    """Eight hex digits, equal for processes that see each other's numbers: one machine, boot and process namespace."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start_time(pid: int) -> str | None:
    """Start of a process of this machine, in ticks since boot; None if there is no such process, or a dead one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in "ZX" else stat[19]


def new_worker() -> str:
    """Unique name of a worker in this process."""
    return f"{_machine()}-{os.getpid()}-{_start_time(os.getpid())}-{uuid.uuid4().hex[:8]}"


def is_alive(worker: str) -> bool | None:
    """Whether the process of a worker runs; None if that cannot be seen from here."""
    if worker.count("-") != 3:
        return None
    machine, pid, started, _ = worker.split("-")
    return _start_time(int(pid)) == started if machine == _machine() and started != "None" else None


class Claims:
    """Claims of shards in one folder. Of several workers that claim a shard, one gets it.

    A claim that was not renewed for ``lease`` seconds belongs to a dead worker. A dead process of the same machine is found at
    once.
    """

    def __init__(self, folder: Path, worker: str, lease: float):
        self.folder, self.worker, self.lease = folder, worker, lease
        self._held: dict[int, range] = {}
        self._renewed = time.monotonic()

    def path(self, shard: range) -> Path:
        """File of a shard's claim."""
        return self.folder / f"{shard.start:08d}"

    def now(self) -> float:
        """The file system's clock, which stamps claims: clocks of machines may differ."""
        probe = temporary_path(self.folder / "clock", self.worker)
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # a folder that is read only
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        """Content of a claim; None if there is none."""
        try:
            content = json.loads(path.read_bytes())
            return content if content.keys() == _UNREADABLE.keys() else _UNREADABLE
        except FileNotFoundError:
            return None
        except (AttributeError, ValueError):  # corrupted, or without hard links not yet written
            return _UNREADABLE

    def of(self, shard: range) -> Claim | None:
        """The claim of a shard, None if nobody has claimed it."""
        path = self.path(shard)
        content = self._read(path) or _UNREADABLE
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return None
        alive = is_alive(content["worker"])
        if alive is not False and self.now() - renewed > self.lease:
            alive = False
        return Claim(**content, renewed=renewed, alive=alive)

    def holds(self, shard: range) -> bool:
        """Whether this worker has claimed the shard."""
        content = self._read(self.path(shard)) if shard.start in self._held else None
        return content is not None and content["worker"] == self.worker

    def acquire(self, shard: range) -> bool:
        """Claim a shard, or reclaim it from a dead worker; whether this worker has it now."""
        path = self.path(shard)
        claim = self.of(shard)
        if claim is not None and (claim.alive is not False or not self._remove_dead(path, claim)):
            return False
        content = {
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if not create(path, json.dumps(content).encode(), self.worker):
            return False
        self._held[shard.start] = shard
        return True

    def _remove_dead(self, path: Path, dead: Claim) -> bool:
        """Remove the claim of a dead worker; of several workers that try, one succeeds."""
        tombstone = temporary_path(path, self.worker)
        try:
            os.rename(path, tombstone)
        except FileNotFoundError:
            return False
        if (self._read(tombstone) or _UNREADABLE)["worker"] == dead.worker:
            tombstone.unlink()
            return True
        # Another worker has reclaimed the shard since. Put its claim back; if that fails, the shard is made twice.
        with contextlib.suppress(OSError):
            os.link(tombstone, path)
        tombstone.unlink()
        return False

    def renew(self) -> None:
        """Renew all claims of this worker; cheap, to be called often."""
        if time.monotonic() - self._renewed < self.lease / 20:
            return
        self._renewed = time.monotonic()
        for shard in list(self._held.values()):
            if self.holds(shard):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.path(shard))
            else:
                self._held.pop(shard.start, None)  # written meanwhile, or reclaimed by another worker

    def release(self, shard: range | None = None) -> None:
        """Give up the claim of a shard, or all claims of this worker."""
        for each in [shard] if shard is not None else list(self._held.values()):
            if self.holds(each):
                self.path(each).unlink(missing_ok=True)
            self._held.pop(each.start, None)
