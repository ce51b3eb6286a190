"""Files and folders that are written completely or not at all, and the processes that write them.

Every writer has a name that is unique on all machines, and tells whether its process is alive.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from calib_guidance.errors import ConfigurationError

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


@functools.cache
def _own_start_time(pid: int) -> str | None:
    """Start time of this process, read once; by its number, since a fork has another one."""
    return _start_time(pid)


def new_worker() -> str:
    """A new name of a worker in this process."""
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_own_start_time(pid)}-{uuid.uuid4().hex[:8]}"


def is_worker(name: str) -> bool:
    """Whether :func:`new_worker` gives such names."""
    return _NAME.fullmatch(name) is not None


def is_alive(worker: str) -> bool | None:
    """Whether the process of a worker runs; None if that cannot be seen from here."""
    if (match := _NAME.fullmatch(worker)) is None or match[1] != _machine() or match[3] == "None":
        return None
    return _start_time(int(match[2])) == match[3]


def end_with_parent(within: float = 600.0, parent: int | None = None) -> None:
    """End this process when the one that started it (``parent``) dies: with SIGTERM, and after ``within`` seconds at once."""
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(within)  # the main thread may wait for the others forever
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Force the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """A new place for what is written before it is renamed to ``path``: beside it, hidden, unique on all machines."""
    return path.with_name(f".{path.name}.{new_worker()}.tmp")


def remove(path: Path) -> None:
    """Remove a file, a link or a complete folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_abandoned(folder: Path, now: float, lease: float) -> None:
    """Remove what dead processes left under names of :func:`temporary_path`.

    A process of another machine is dead if it has written nothing there for ``lease`` seconds before ``now``.
    """
    for path in folder.glob(".*.tmp"):
        worker = path.name.rsplit(".", 2)[1]
        if not is_worker(worker) or (alive := is_alive(worker)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removes it too, or has completed it
            if alive is False or now - max(each.lstat().st_mtime for each in (path, *path.rglob("*"))) > lease:
                remove(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place for a new file or folder that is renamed to ``path`` at the end of the block, and removed if it raises.

    The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` at the end of the block; nothing changes where the block raises.

    The content is forced to the disk first: a process or a machine that stops leaves either the old file or the new one.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Path, option: str) -> None:
    """Raise ConfigurationError where a folder cannot be made or written to, before work for it is done. Nothing is left there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigurationError(f"{option}: {folder} cannot be written: {there}: {error.strerror}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def create(path: Path, data: bytes) -> bool:
    """Create a file that is never seen empty; False if it exists. Of several processes that try, one succeeds."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                with open(path, "xb") as file:
                    try:
                        file.write(data)
                        file.flush()
                    except BaseException:
                        path.unlink()
                        raise
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file in another place, atomically: as a hard link where the file system has them, else as a copy."""
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)
