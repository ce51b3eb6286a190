"""Files written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from calib_guidance.errors import ConfigurationError


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Force the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path, writer: str | None = None) -> Path:
    """Where a file is written before it takes its place: beside it, hidden, one for each writer (by default the process)."""
    return path.with_name(f".{path.name}.{writer or os.getpid()}.tmp")


@contextlib.contextmanager
def _temporary_file(path: Path, writer: str | None) -> Iterator[tuple[BinaryIO, Path]]:
    temporary = temporary_path(path, writer)
    try:
        with open(temporary, "wb") as file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], writer: str | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` at the end of the block; nothing changes where the block raises.

    The content goes to a temporary file in the same folder, see :func:`temporary_path`, is forced to the disk and renamed: a
    process or a machine that stops leaves either the old file or the new one. The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path, writer) as (file, temporary):
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    sync_folder(path.parent)


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


def create(path: Path, data: bytes, writer: str | None = None) -> bool:
    """Create a file that is never seen empty; False if it exists. Of several processes that try, one succeeds."""
    with _temporary_file(path, writer) as (file, temporary):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(path, "xb") as file:
                    try:
                        file.write(data)
                        file.flush()
                    except BaseException:
                        path.unlink()
                        raise
            except FileExistsError:
                return False
    return True


def link_or_copy(source: Path, target: Path, writer: str | None = None) -> None:
    """Put a file in another place, atomically: as a hard link where the file system has them, else as a copy."""
    temporary = temporary_path(target, writer)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
