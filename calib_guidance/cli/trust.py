"""What a configuration runs that is not of this package or of its libraries, listed before it runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

TRUSTED = ("calib_guidance", "torch", "lightning", "torchmetrics", "torchvision", "timm")
_DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")
_listed: set[str] = set()


def _is_module(name: str) -> bool:
    """Whether Python finds a module of this name, or the current folder has one."""
    return (
        importlib.util.find_spec(name) is not None or Path(f"{name}.py").exists() or Path(name, "__init__.py").exists()
    )


def _parse(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):  # the parser of the command says what is wrong
        return None


def foreign_names(node: object) -> Iterator[str]:
    """Dotted names from outside TRUSTED that a value names, in YAML files that it names as well."""
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            found = _DOTTED.fullmatch(node["class_path"])
            if found and found[1] not in TRUSTED:
                yield node["class_path"]
        for value in node.values():
            yield from foreign_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from foreign_names(value)
    elif isinstance(node, str):
        for part in node.split(","):
            found = _DOTTED.fullmatch(part)
            if found and found[1] not in TRUSTED and not Path(part).is_file() and _is_module(found[1]):
                yield part
        if node.endswith((".yaml", ".yml")) and Path(node).is_file():
            yield from foreign_names(_parse(Path(node).read_text(errors="replace")))


def list_foreign(argv: Sequence[str]) -> None:
    """Print the names that the arguments of a command, and the files they name, have from outside TRUSTED; each once."""
    values = [re.sub(r"^--?[\w.+-]*=?", "", argument) for argument in argv]
    parsed = (_parse(value) if any(mark in value for mark in "{[\n") or ": " in value else value for value in values)
    names = dict.fromkeys(name for node in parsed for name in foreign_names(node) if name not in _listed)
    if names:
        _listed.update(names)
        print(f"calib-guidance: this runs code from outside {', '.join(TRUSTED)}: {', '.join(names)}", file=sys.stderr)
