"""Text and YAML files that users name, with errors that name the file and the line."""

import contextlib
import os
from pathlib import Path
from typing import Any

import yaml

from calib_guidance.errors import ConfigurationError, first_line

# libyaml is ten times as fast; a PyYAML that was built without it lacks these.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _is_shallow(text: str) -> bool:
    """Whether libyaml can read a text; it ends the process where tens of thousands of brackets are nested."""
    return len(text) <= 30_000 and text.count("[") + text.count("{") <= 1000


class _UniqueKeys:
    """Refuses a key that stands twice in a mapping; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)  # pyright: ignore


class _Fast(_UniqueKeys, _Loader):
    pass


class _Exact(_UniqueKeys, yaml.SafeLoader):
    """Names the place and the character where libyaml names the line after it."""


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#x} in line {line}"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Content of a YAML file."""
    text = read_text(path)
    try:
        if _is_shallow(text):
            with contextlib.suppress(yaml.YAMLError):
                return yaml.load(text, _Fast)
        return yaml.load(text, _Exact)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else first_line(error)
        raise ConfigurationError(f"{path} is not valid YAML: {place}") from error


def parse_yaml(text: str) -> Any:
    """Content of a YAML text, which may be a single value."""
    return yaml.load(text, _Loader if _is_shallow(text) else yaml.SafeLoader)


def dump_yaml(node: object) -> str:
    """A node as YAML, its keys in their order."""
    return yaml.dump(node, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
