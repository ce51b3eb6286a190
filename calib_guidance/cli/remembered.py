"""What a command answers again without any import: help pages, and the report of a run that is complete and unchanged.

Answers lie in the user's cache folder. Each is of one command line, one state of the package and, for a run, one state of every
file that it read or wrote; where anything differs the command runs as if there were none.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.shipped import find_file

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("jsonargparse", "lightning", "numpy", "torch")
_MOST = 10_000  # files of a folder; more take as long to look at as the run takes to start


def _stamp(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _inside(path: Path) -> list[Path]:
    """The file, or the files of the folder; OSError where they are too many."""
    if path.is_file():
        return [path]
    found = list(itertools.islice((file for file in path.rglob("*") if file.is_file()), _MOST + 1))
    if len(found) > _MOST:
        raise OSError(f"{path} holds more than {_MOST} files")
    return sorted(found)


def _values(node: object, within: tuple[str, ...] = ()) -> Iterator[str]:
    """All strings below a node of a configuration, also in the YAML files that it names."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _values(value, within)
    elif isinstance(node, str):
        yield node
        if node.endswith((".yaml", ".yml")) and node not in within:
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # the command says what is wrong with it
                yield from _values(yaml.safe_load(find_file(node).read_text()), (*within, node))


def _read_files(argv: Sequence[str]) -> list[Path]:
    """Files and folders that the arguments and configurations of a command name."""
    found = set()
    for argument in argv:
        value = argument.partition("=")[2] or argument
        for text in _values(yaml.safe_load(value) if "\n" in value else value):
            with contextlib.suppress(OSError, RuntimeError):  # too long for a name; ~ of nobody
                if text and "\n" not in text and (path := find_file(Path(text).expanduser())).exists():
                    found.add(path.absolute())
    return sorted(found)


class Answer:
    """What was printed for a command line, if it still holds.

    Args:
        argv: of the command, with its configurations as files or YAML text.
        kind: of the answer.
    """

    def __init__(self, argv: Sequence[str], kind: str):
        libraries = [find_spec(name) for name in _LIBRARIES]
        code = [*(Path(spec.origin) for spec in libraries if spec), *sorted(_PACKAGE.rglob("*.py"))]
        columns = shutil.get_terminal_size().columns
        key = [kind, list(argv), os.getcwd(), columns if kind == "help" else 0, [_stamp(path) for path in code]]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(root, "calib_guidance", f"{kind}-{name}.json")

    def read(self) -> str | None:
        """The text; None where there is none, or where a file has changed since."""
        try:
            answer = json.loads(self.path.read_text())
            known = {path: [path, *state] for path, *state in answer["files"]}
            files = [file for folder in answer["roots"] for file in _inside(Path(folder))]
            same = {str(file) for file in files} == known.keys() and all(_stamp(f) == known[str(f)] for f in files)
            return answer["text"] if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, text: str, roots: Sequence[Path] = ()) -> None:
        """Keep a text for as long as the files in these files and folders stay as they are."""
        try:
            files = sorted({file for root in roots for file in _inside(root)})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            answer = {"text": text, "roots": [str(root) for root in roots], "files": [_stamp(file) for file in files]}
            write_text(self.path, json.dumps(answer))
        except OSError:  # no home, no space, or a large folder: the next call takes as long as this one
            return


class RunAnswer:
    """The report of ``predict``, for as long as what it read and its folder stay as they are.

    Args:
        argv: of the command, see :class:`Answer`.
    """

    def __init__(self, argv: Sequence[str]):
        self._answer = Answer(argv, "run")
        self._before = {path: self._stamps(path) for path in _read_files(argv)}

    @staticmethod
    def _stamps(path: Path) -> list[list[Any]] | None:
        """Of all files in a folder; None where they are too many."""
        try:
            return [_stamp(file) for file in _inside(path)]
        except OSError:
            return None

    def read(self) -> str | None:
        return self._answer.read()

    def write(self, report: str, folder: Path) -> None:
        """Keep the report of a complete run."""
        read = {path: before for path, before in self._before.items() if path != folder.absolute()}
        if all(before is not None and before == self._stamps(path) for path, before in read.items()):
            self._answer.write(report, [*read, folder.absolute()])
