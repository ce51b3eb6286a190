"""State of a run folder: which shards are done, claimed, open or corrupted, and which files do not belong there."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from calib_guidance.runs.claims import Claims, is_alive
from calib_guidance.runs.store import CorruptedShardError, ShardStore


class ShardState(NamedTuple):
    """State of a shard.

    Attributes:
        name: ``done``, ``claimed`` (by a worker that may be alive), ``open`` or ``corrupted``.
        reason: why it is not done; who has claimed it.
    """

    name: str
    reason: str = ""


def shard_state(store: ShardStore, claims: Claims, shard: range, verify: bool = False) -> ShardState:
    """State of one shard.

    Args:
        store: its files.
        claims: of the workers.
        shard: one of ``store.shards()``.
        verify: also compare the checksum of the table, which reads it.
    """
    record, problem = None, None
    try:
        record = store.check(shard, verify)
    except CorruptedShardError as error:
        problem = ShardState("corrupted", str(error))
    if record is not None and record["requested"] >= len(shard):
        return ShardState("done")
    claim = claims.of(shard)
    if claim is not None and claim.alive is not False:
        return ShardState("claimed", f"process {claim.pid} on {claim.host} since {claim.since}")
    if problem is not None:
        return problem
    if record is not None:
        return ShardState("open", f"made with {record['requested']} of the {len(shard)} samples that are requested now")
    return ShardState("open", "not made yet" if claim is None else f"process {claim.pid} on {claim.host} died")


def foreign_files(store: ShardStore, claims: Claims, count: int) -> list[Path]:
    """Files in the folders of samples, records and claims that belong to no shard of ``count`` samples."""
    pattern = re.compile(r"(\d{8,})(\.\w+)?")
    endings = {store.samples: {".parquet"}, store.records: {".json", ".safetensors"}, claims.folder: {None}}
    foreign = []
    for folder, known in endings.items():
        for path in sorted(folder.glob("*")):
            if path.name.startswith("."):
                continue  # being written, left by a kill and removed by the next run, or the file system's own (.nfs…)
            match = pattern.fullmatch(path.name)
            first = int(match[1]) if match and match[2] in known else None
            if first is None or first % store.shard_size or first >= count:
                foreign.append(path)
    return foreign


def clean_up(store: ShardStore, claims: Claims) -> None:
    """Remove what killed workers left: unfinished files, and claims of shards that are done."""
    now = claims.now()
    for path in (p for f in (store.path, store.samples, store.records, claims.folder) for p in f.glob(".*.tmp")):
        with contextlib.suppress(FileNotFoundError):  # another worker removes it too
            alive = is_alive(path.name.rsplit(".", 2)[1])
            if alive is False or (alive is None and now - path.stat().st_mtime > claims.lease):
                path.unlink()
    for shard in store.shards():
        claim = claims.of(shard)
        if claim is not None and claim.alive is False and shard_state(store, claims, shard).name == "done":
            claims.path(shard).unlink(missing_ok=True)
