"""Claims of shards: leases that workers renew while they are alive, as files in a folder."""

import contextlib
import logging
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from calib_guidance.backend.atomic import create, is_alive, is_worker, new_worker, remove, temporary_path
from calib_guidance.runs.integrity import canonical_json, read_checked, with_checksum

log = logging.getLogger(__name__)
_UNREADABLE = {"worker": "", "host": "an unknown machine", "pid": 0, "since": "an unknown time"}  # stands for a claim
_MOST_BYTES = 10_000


class Claim(NamedTuple):
    """A worker's claim of a shard."""

    worker: str
    host: str
    pid: int
    since: str  # ISO 8601
    renewed: float  # seconds since the epoch on the file system's clock
    alive: bool | None  # None within the lease of a worker on another machine

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claims:
    """Claims of shards in one folder. Of several workers that claim a shard, one gets it.

    A claim that was not renewed for ``lease`` seconds belongs to a dead worker; a dead process of the same machine is found at
    once. What no worker wrote in the place of a claim is replaced with a message.
    """

    def __init__(self, folder: Path, worker: str, lease: float):
        self.folder, self.worker, self.lease = folder, worker, lease
        self._held: set[range] = set()
        self._renewed = time.monotonic()

    def path(self, shard: range) -> Path:
        """File of a shard's claim."""
        return self.folder / f"{shard.start:08d}"

    def now(self) -> float:
        """The file system's clock, which stamps claims: clocks of machines may differ."""
        probe = temporary_path(self.folder / "clock")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # a folder that is read only
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    @staticmethod
    def _content(path: Path) -> dict[str, Any] | None:
        """Content of a claim; None for what no worker wrote."""
        size = path.lstat().st_size
        if path.is_symlink() or size > _MOST_BYTES:
            return None
        try:
            if not size and path.is_file():  # without hard links not yet written
                return _UNREADABLE
            content = read_checked(path, {key: type(value) for key, value in _UNREADABLE.items()})
        except PermissionError:  # another user's
            return _UNREADABLE
        except ValueError:
            return None
        return {key: content[key] for key in _UNREADABLE} if is_worker(content["worker"]) else None

    def of(self, shard: range) -> Claim | None:
        """The claim of a shard, None if nobody has claimed it."""
        path = self.path(shard)
        try:
            content, renewed = self._content(path), path.lstat().st_mtime
        except FileNotFoundError:
            return None
        alive = is_alive(content["worker"]) if content else False
        # One that is dated later than its own lease does not count as alive either.
        if alive is not False and abs(self.now() - renewed) > self.lease:
            alive = False
        return Claim(**content or _UNREADABLE, renewed=renewed, alive=alive)

    def holds(self, shard: range) -> bool:
        """Whether this worker has claimed the shard."""
        claim = self.of(shard) if shard in self._held else None
        return claim is not None and claim.worker == self.worker

    def acquire(self, shard: range) -> bool:
        """Claim a shard, or reclaim it from a dead worker; whether this worker has it now."""
        path, claim = self.path(shard), self.of(shard)
        if claim is not None and (claim.alive is not False or not self._remove_dead(path, claim)):
            return False
        content = {
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if not create(path, canonical_json(with_checksum(content))):
            return False
        self._held.add(shard)
        return True

    def _remove_dead(self, path: Path, dead: Claim) -> bool:
        """Remove the claim of a dead worker; of several workers that try, one succeeds."""
        tombstone = temporary_path(path)
        try:
            os.rename(path, tombstone)
        except FileNotFoundError:
            return False
        content = self._content(tombstone)
        if content is None:
            log.warning(f"{path} is not a claim that a worker wrote: replaced")
        if tombstone.is_dir() and not tombstone.is_symlink():  # somebody's folder is kept
            os.rename(tombstone, path.with_name(f"{path.name}.{new_worker()}"))
            return True
        if (content or _UNREADABLE)["worker"] == dead.worker:
            remove(tombstone)
            return True
        # Another worker has reclaimed the shard since. Put its claim back; if that fails, the shard is made twice.
        with contextlib.suppress(OSError):
            os.link(tombstone, path)
        remove(tombstone)
        return False

    def renew(self) -> None:
        """Renew all claims of this worker; cheap, to be called often."""
        if time.monotonic() - self._renewed < self.lease / 20:
            return
        self._renewed = time.monotonic()
        for shard in list(self._held):
            with contextlib.suppress(OSError):  # that the folder cannot be written is said where a shard is
                if self.holds(shard):
                    os.utime(self.path(shard))
                else:
                    self._held.discard(shard)  # written meanwhile, or reclaimed by another worker

    def release(self, shard: range | None = None) -> None:
        """Give up the claim of a shard, or all claims of this worker."""
        for each in [shard] if shard is not None else list(self._held):
            with contextlib.suppress(OSError):  # of a read-only folder: the process ends, and so does the claim
                if self.holds(each):
                    self.path(each).unlink(missing_ok=True)
            self._held.discard(each)
