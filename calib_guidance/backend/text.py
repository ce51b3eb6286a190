"""Text and YAML files that users name, with errors that name the file and the line."""

import os
from pathlib import Path
from typing import Any

import yaml

from calib_guidance.errors import ConfigurationError, first_line


class _UniqueKeys(yaml.SafeLoader):
    """Safe loader that refuses a key that stands twice in a mapping; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


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
    try:
        return yaml.load(read_text(path), _UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else first_line(error)
        raise ConfigurationError(f"{path} is not valid YAML: {place}") from error
