"""Files that come with the package: named configurations and the weights of the digits."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDERS = ("lightning_configs", "checkpoints")


def shipped(name: str | os.PathLike[str]) -> Path:
    """Path of a file or folder below ``lightning_configs`` or ``checkpoints``, which need not exist.

    A wheel holds both folders inside the package, a source tree beside it.
    """
    inside = (_PACKAGE / Path(name).parts[0]).is_dir()
    return (_PACKAGE if inside else _PACKAGE.parent) / name


def find_file(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the file of the package that it names where only that exists, from any working directory."""
    path = Path(path)
    if path.exists() or path.parts[:1] not in [(folder,) for folder in FOLDERS] or not shipped(path).exists():
        return path
    return shipped(path)
