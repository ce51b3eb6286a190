"""``calib-guidance status DIR``: samples that are done and left, workers, and files that are corrupted."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib_guidance.runs.folder import RunFolder

_LISTED = 10  # lines of one kind that are printed; --json has all
_NAMES = ("done", "claimed", "open", "corrupted")


def _spans(shards: Sequence[dict[str, Any]]) -> list[str]:
    """Indices of shards, ``first–last``, neighbors joined."""
    spans: list[tuple[int, int]] = []
    for shard in shards:
        start = spans.pop()[0] if spans and spans[-1][1] == shard["first"] - 1 else shard["first"]
        spans.append((start, shard["last"]))
    return [f"{first}–{last}" for first, last in spans]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def survey(run: RunFolder, verify: bool = False) -> dict[str, Any]:
    """State of a run folder, as ``calib-guidance status --json`` prints it.

    ``complete`` (every shard is done), ``sound`` (nothing is corrupted or foreign), ``verified`` (every file was read and
    compared with its checksum; otherwise sizes, and the checksums of records and sums); numbers of ``samples`` and
    ``shards``; lists of ``open``, ``claims``, ``corrupted``, ``foreign``, ``surplus``, ``failed`` and ``workers``;
    ``images_per_second`` of one worker and of the active ones together, and ``seconds_left`` at the pace of the active workers,
    or of one worker if none is active. None as long as the pace is unknown.
    """
    states = {shard: run.state(shard, verify) for shard in run.shards()}
    by_name = {name: [shard for shard, state in states.items() if state.name == name] for name in _NAMES}
    records = [record for shard in by_name["done"] if (record := run.record(shard)) is not None]
    claims = {shard: claim for shard in states if (claim := run.claims.of(shard)) is not None}
    foreign = [str(path) for path in run.foreign()]
    written, seconds = (sum(record[key] for record in records) for key in ("rows", "seconds"))
    remaining = sum(len(shard) for shard, state in states.items() if state.name != "done")
    pace = written / seconds if seconds else None  # of one worker
    workers: dict[str, dict[str, Any]] = {}
    for record in records:
        new = {key: record[key] for key in ("worker", "host", "device")} | {"samples": 0, "seconds": 0.0}
        worker = workers.setdefault(record["worker"], new)
        worker["samples"] += record["rows"]
        worker["seconds"] += record["seconds"]
    active = {claim.worker for claim in claims.values() if claim.alive is not False}
    for name, worker in workers.items():
        worker["images_per_second"] = worker["samples"] / worker["seconds"] if worker["seconds"] else None
        worker["active"] = name in active
    # A worker without a shard so far is as fast as the others.
    known = [workers[name]["images_per_second"] if name in workers else pace for name in active]
    together = sum(known) if known and None not in known else None
    failed = [sample for record in records for sample in record["failed"]]

    def place(shard: range) -> dict[str, Any]:
        return {"first": shard.start, "last": shard[-1]}

    wrong = {name: [place(s) | {"reason": states[s].reason} for s in by_name[name]] for name in ("open", "corrupted")}
    return {
        "folder": str(run.path),
        "complete": not remaining,
        "sound": not by_name["corrupted"] and not foreign,
        "verified": verify,
        "samples": {"requested": run.num_requests, "written": written, "failed": len(failed), "remaining": remaining},
        "shards": {"size": run.shard_size, "all": len(states)} | {name: len(each) for name, each in by_name.items()},
        "open": wrong["open"],
        "claims": [place(shard) | claim._asdict() for shard, claim in claims.items()],
        "corrupted": wrong["corrupted"],
        "foreign": foreign,
        "surplus": [place(shard) for shard in run.surplus()],
        "failed": failed,
        "workers": sorted(workers.values(), key=lambda worker: -worker["samples"]),
        "images_per_second": {"one_worker": pace, "active_workers": together},
        "seconds_left": remaining / (together or pace) if pace else None,
    }


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [title, *(f"  {line}" for line in (*lines[:_LISTED], *more))] if lines else []


def status_lines(found: dict[str, Any]) -> list[str]:
    """Text of a :func:`survey`."""
    samples, shards, last = found["samples"], found["shards"], "complete"
    if not found["complete"]:
        last = f"{samples['remaining']} samples are left"
        if found["seconds_left"] is not None:
            active = any(claim["alive"] is not False for claim in found["claims"])
            how = "at the pace of the active workers" if active else "with one worker like these; none is active"
            last += f": {_duration(found['seconds_left'])} {how}"
    elif not found["sound"]:
        last += ", but not sound"
    alive = {True: "alive", None: "alive or dead, its lease has not run out", False: "dead"}
    corrupted = [f"{d['first']}–{d['last']}: {d['reason']}" for d in found["corrupted"]]
    claims = [
        f"{c['first']}–{c['last']} by process {c['pid']} on {c['host']} since {c['since']}, {alive[c['alive']]}"
        for c in found["claims"]
    ]
    steps = ["" if s["step"] is None else f", t = {s['step']:g}" for s in found["failed"]]
    failed = [f"sample {s['index']}{step}: {s['reason']}" for s, step in zip(found["failed"], steps, strict=True)]
    workers = [
        f"{w['worker']} on {w['host']}, {w['device']}: {w['samples']} samples"
        + (f", {w['images_per_second']:.3g} per second" if w["images_per_second"] else "")
        + (", active" if w["active"] else "")
        for w in found["workers"]
    ]
    return [
        f"{found['folder']}: {samples['written']} of {samples['requested']} samples",
        f"shards of {shards['size']}: {', '.join(f'{shards[name]} {name}' for name in _NAMES)}"
        + ("" if found["verified"] else " (by size; --verify reads every byte)"),
        *_listed("open:", _spans(found["open"])),
        *_listed("claimed:", claims),
        *_listed("corrupted (the next run regenerates them):", corrupted),
        *_listed("foreign files, which belong to no shard and are not counted (remove them):", found["foreign"]),
        *_listed("kept from when more samples were requested, and not counted:", _spans(found["surplus"])),
        *_listed("failed samples:", failed),
        *_listed("made by:", workers),
        last,
    ]


def status(args: Sequence[str]) -> None:
    """``calib-guidance status``: see its ``--help``, also for the exit status."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance status",
        description="Show which samples of a run are done and left, who makes them, and which files are corrupted.",
        epilog="Exit status: 0 complete and sound; 1 not complete; 2 no run, or it cannot be read; 3 corrupted or foreign files.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder (trainer.default_root_dir)")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(list(args))
    found = survey(RunFolder.open(options.folder), options.verify)
    print(json.dumps(found, indent=1) if options.json else "\n".join(status_lines(found)))
    if not found["sound"]:
        raise SystemExit(3)
    if not found["complete"]:
        raise SystemExit(1)
