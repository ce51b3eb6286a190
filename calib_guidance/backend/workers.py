"""Names of workers, unique on all machines, which tell whether the process behind one is alive."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

_NAME = re.compile(r"(\w+)-(\d{1,10})-(\d+|None)-(\w+)")  # machine, process, its start, random


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
    """A new name of a worker in this process."""
    return f"{_machine()}-{os.getpid()}-{_start_time(os.getpid())}-{uuid.uuid4().hex[:8]}"


def is_worker(name: str) -> bool:
    """Whether a name is one that :func:`new_worker` gives."""
    return _NAME.fullmatch(name) is not None


def is_alive(worker: str) -> bool | None:
    """Whether the process of a worker runs; None if that cannot be seen from here."""
    if (match := _NAME.fullmatch(worker)) is None or match[1] != _machine() or match[3] == "None":
        return None
    return _start_time(int(match[2])) == match[3]


def end_with_parent(within: float = 600.0) -> None:
    """End this process when the one that started it dies: with SIGTERM, and after ``within`` seconds at once."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(within)  # the main thread may wait for the others forever
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
