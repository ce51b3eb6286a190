"""Files that are written completely or not at all."""

import os

import pytest

from calib_guidance.backend.atomic import atomic_write, write_text
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
