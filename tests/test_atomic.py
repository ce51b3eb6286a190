"""Files that are written completely or not at all."""

import os
import subprocess
import sys

import pytest

from calib_guidance.backend import atomic
from calib_guidance.backend.atomic import atomic_path, atomic_write, remove_abandoned, temporary_path, write_text
from calib_guidance.errors import first_line


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    write_text(path, "x̂0\n")
    assert path.read_text(encoding="utf-8") == "x̂0\n"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert list(path.parent.iterdir()) == [path]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_what_fails_changes_nothing(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(*args):
        raise OSError("no space")

    if failing != "write":
        monkeypatch.setattr(os, failing, fail)
    content = "new" if failing != "write" else "\udcff"  # which UTF-8 cannot encode
    with pytest.raises((OSError, UnicodeEncodeError), match="no space|surrogates"):
        write_text(path, content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_line_of_an_error():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_a_folder_takes_its_place_at_the_end(tmp_path):
    with atomic_path(tmp_path / "new") as folder:
        folder.mkdir()
        (folder / "a").touch()
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "a"]

    def fail():
        with atomic_path(tmp_path / "other") as folder:
            folder.mkdir()
            (folder / "a").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_temporary_names_are_unique_and_tell_who_writes(tmp_path, monkeypatch):
    """Of two containers with equal process numbers, too. What others named is left alone."""
    names = {temporary_path(tmp_path / "a").name for _ in range(100)}
    assert len(names) == 100
    mine, foreign = temporary_path(tmp_path / "a"), tmp_path / ".mine.tmp"
    monkeypatch.setattr(atomic, "_machine", lambda: "elsewhere")
    there, silent = temporary_path(tmp_path / "a"), temporary_path(tmp_path / "b")
    monkeypatch.undo()
    for path in (mine, there, silent):
        path.mkdir()
        (path / "file").touch()
    foreign.touch()
    for path in (silent / "file", silent, there, foreign):
        os.utime(path, (0, 0))
    remove_abandoned(tmp_path, there.joinpath("file").stat().st_mtime, 60)
    assert set(tmp_path.iterdir()) == {mine, there, foreign}


def test_a_process_ends_with_its_parent(tmp_path):
    """SIGKILL of the parent leaves no orphan."""
    child = "import time; from calib_guidance.backend.atomic import *; end_with_parent(60); print(1, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    process.kill()
    assert process.stdout.read() == b""  # which ends when the child has
    process.wait()
