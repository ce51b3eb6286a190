"""``calib-guidance status DIR``: what a sampling run has done, what it has left, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.store import RunFolder, ShardState

_LISTED = 10  # lines of one kind that are printed; --json has all


def _spans(shards: Sequence[range]) -> list[str]:
    """Indices of consecutive shards, ``first–last``, neighbours joined."""
    spans: list[list[int]] = []
    for shard in shards:
        if spans and spans[-1][1] == shard.start:
            spans[-1][1] = shard.stop
        else:
            spans.append([shard.start, shard.stop])
    return [f"{start}–{stop - 1}" for start, stop in spans]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def survey(run: RunFolder, verify: bool = False) -> dict[str, Any]:
    """All that the folder of a run says.

    Args:
        run: see :meth:`calib_guidance.runs.store.RunFolder.open`.
        verify: read every file and compare its checksum; otherwise sizes, and the checksums of records and sums.

    Returns:
        What ``calib-guidance status --json`` prints: ``complete`` (every shard is done), ``sound`` (nothing is damaged or
        foreign), ``verified``; numbers of ``samples`` and ``shards``; lists of ``open``, ``claims``, ``damaged``, ``foreign``,
        ``left_out`` and ``workers``; ``images_per_second`` of the workers that are at it and of one of them, and
        ``seconds_left`` at that pace, with one worker where nobody is at it. None where nothing is known of the pace.
    """
    states: dict[range, ShardState] = {shard: run.state(shard, verify) for shard in run.shards()}
    of_state = {
        name: [shard for shard, state in states.items() if state.name == name]
        for name in ("done", "claimed", "open", "damaged")
    }
    records = {shard: record for shard in of_state["done"] if (record := run.record(shard)) is not None}
    claims = {shard: claim for shard in states if (claim := run.claim_of(shard)) is not None}
    at_it = {claim.worker for claim in claims.values() if claim.alive is not False}

    workers: dict[str, dict[str, Any]] = {}
    for record in records.values():
        new = {key: record[key] for key in ("worker", "host", "device")} | {"samples": 0, "seconds": 0.0}
        worker = workers.setdefault(record["worker"], new)
        worker["samples"] += record["rows"]
        worker["seconds"] += record["seconds"]
    for name, worker in workers.items():
        worker["images_per_second"] = worker["samples"] / worker["seconds"] if worker["seconds"] else None
        worker["at_it"] = name in at_it

    written = sum(record["rows"] for record in records.values())
    seconds = sum(record["seconds"] for record in records.values())
    remaining = sum(len(shard) for shard, state in states.items() if state.name != "done")
    pace = written / seconds if seconds else None  # of one worker
    # A worker that has just begun has the others' pace.
    known = [workers[name]["images_per_second"] if name in workers else pace for name in at_it]
    together = sum(known) if known and None not in known else None
    return {
        "folder": str(run.path),
        "complete": not remaining,
        "sound": not of_state["damaged"] and not run.foreign(),
        "verified": verify,
        "samples": {
            "asked": run.num_requests,
            "written": written,
            "left_out": sum(len(record["left_out"]) for record in records.values()),
            "remaining": remaining,
        },
        "shards": {"size": run.shard_size, "all": len(states)} | {name: len(each) for name, each in of_state.items()},
        "open": [{"first": s.start, "last": s[-1], "reason": states[s].reason} for s in of_state["open"]],
        "claims": [{"first": s.start, "last": s[-1]} | claim._asdict() for s, claim in claims.items()],
        "damaged": [{"first": s.start, "last": s[-1], "reason": states[s].reason} for s in of_state["damaged"]],
        "foreign": [str(path) for path in run.foreign()],
        "left_out": [sample for record in records.values() for sample in record["left_out"]],
        "workers": sorted(workers.values(), key=lambda worker: -worker["samples"]),
        "images_per_second": {"one_worker": pace, "all_at_it": together},
        "seconds_left": remaining / (together or pace) if pace else None,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    """What people read of a :func:`survey`."""

    def listed(title: str, lines: Sequence[str]) -> list[str]:
        more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        return [title, *(f"  {line}" for line in (*lines[:_LISTED], *more))] if lines else []

    samples, shards, pace = found["samples"], found["shards"], found["images_per_second"]
    alive = {True: "alive", None: "alive or dead, its lease has not run out", False: "dead"}
    to_do = [range(entry["first"], entry["last"] + 1) for entry in found["open"]]
    lines = [
        f"{found['folder']}: {samples['written']} of {samples['asked']} samples",
        f"shards of {shards['size']}: {shards['done']} done, {shards['claimed']} claimed, {shards['open']} open, "
        f"{shards['damaged']} damaged" + ("" if found["verified"] else " (by size; --verify reads every byte)"),
        *listed("open:", _spans(to_do)),
        *listed(
            "claimed:",
            [
                f"{c['first']}–{c['last']} by process {c['pid']} on {c['host']} since {c['since']}, {alive[c['alive']]}"
                for c in found["claims"]
            ],
        ),
        *listed(
            "damaged (the next run makes them anew):",
            [f"{d['first']}–{d['last']}: {d['reason']}" for d in found["damaged"]],
        ),
        *listed("foreign files, which belong to no shard and are not counted (remove them):", found["foreign"]),
        *listed(
            "left out:",
            [
                f"sample {sample['index']}"
                + (f", t = {sample['step']:g}" if sample["step"] is not None else "")
                + f": {sample['reason']}"
                for sample in found["left_out"]
            ],
        ),
        *listed(
            "made by:",
            [
                f"{w['worker']} on {w['host']}, {w['device']}: {w['samples']} samples"
                + (f", {w['images_per_second']:.3g} a second" if w["images_per_second"] else "")
                + (", at it" if w["at_it"] else "")
                for w in found["workers"]
            ],
        ),
    ]
    if found["complete"]:
        lines.append("complete" + ("" if found["sound"] else ", but not sound"))
    elif pace["one_worker"] is None:
        lines.append(f"{samples['remaining']} samples are left")
    else:
        workers = sum(claim["alive"] is not False for claim in found["claims"])
        how = "at the pace of those who are at it" if workers else "with one worker like these; nobody is at it"
        lines.append(f"{samples['remaining']} samples are left: {_duration(found['seconds_left'])} {how}")
    return lines


def status(args: Sequence[str]) -> None:
    """``calib-guidance status``: see its ``--help``.

    Args:
        args: the words after ``status``.

    Raises:
        ConfigurationError: there is no run in the folder, or it cannot be read.
        SystemExit: with status 1 for a run that is not complete, 3 for one with damaged or foreign files.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance status",
        description="What a sampling run has done, what is left, and whether it is whole.",
        epilog="Exit status: 0 complete and sound; 1 not complete; 2 no run, or it cannot be read; 3 damaged or foreign files.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder (trainer.default_root_dir)")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(list(args))
    try:
        found = survey(RunFolder.open(options.folder), options.verify)
    except OSError as error:
        raise ConfigurationError(f"{options.folder} cannot be read: {error.strerror}: {error.filename}") from error
    print(json.dumps(found, indent=1) if options.json else "\n".join(_lines(found)))
    if not found["sound"]:
        raise SystemExit(3)
    if not found["complete"]:
        raise SystemExit(1)
