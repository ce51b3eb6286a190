"""Checksums of the JSON files of a run folder, and their fields: a file that is damaged or hostile is not a file of the run."""

import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

# Types of the fields of a record, see RunFolder.write, and of a failed sample in it.
_RECORD = {
    **dict.fromkeys(("run", "sha256", "device", "host", "worker", "written"), str),
    **dict.fromkeys(("first", "requested", "rows", "bytes"), int),
    **{"failed": list, "sums_sha256": (str, NoneType), "seconds": (int, float)},
}
_FAILED = {"index": int, "step": (int, float, NoneType), "reason": str}

# Seconds that an empty file may still be written in: file systems without hard links show it before.
_WRITTEN_WITHIN = 0.5


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """JSON that has equal bytes for equal contents."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON mapping with its checksum, see :func:`read_checked`."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return content | {"checksum": sha256(canonical_json(content))}


def checked_json(content: Mapping[str, Any]) -> bytes:
    """JSON for people of a mapping and its checksum, see :func:`read_checked`."""
    return json.dumps(with_checksum(content), indent=1, ensure_ascii=False).encode() + b"\n"


def check_types(content: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that are missing or of another type."""
    for name, kind in types.items():
        if not isinstance(content.get(name, ...), kind) or isinstance(content[name], bool):
            raise ValueError(f"{name} is {content.get(name, 'missing')!r:.80}")


def read_checked(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`checked_json` wrote, with fields of these types; else ValueError, and FileNotFoundError without a file."""
    try:
        # Asked once: between two questions another worker may create the file.
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        if not path.is_symlink():
            raise
        regular = False
    if not regular:
        raise ValueError("it is not a regular file")
    until = time.monotonic() + _WRITTEN_WITHIN
    while not (data := path.read_bytes()) and time.monotonic() < until:
        time.sleep(0.02)
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError("it has no checksum: it is damaged, or of another version")
    if content["checksum"] != with_checksum(content)["checksum"]:
        raise ValueError("its checksum is wrong")
    check_types(content, types)
    return content


def read_record(path: Path) -> dict[str, Any]:
    """A record of a shard, with fields as :meth:`RunFolder.write` gives them; errors as those of :func:`read_checked`."""
    record = read_checked(path, _RECORD)
    first, requested, rows, failed = (record[key] for key in ("first", "requested", "rows", "failed"))
    for sample in failed:
        check_types(sample if isinstance(sample, dict) else {}, _FAILED)
    indices = {sample["index"] for sample in failed}
    inside = all(first <= index < first + requested for index in indices)
    if not (rows + len(indices) == requested > 0 <= rows and inside):
        raise ValueError(f"{rows} samples and the failed ones are not the {requested} requested ones")
    if record["bytes"] < 0 or not 0 <= record["seconds"] < math.inf:
        raise ValueError(f"bytes is {record['bytes']}, seconds {record['seconds']}")
    return record
