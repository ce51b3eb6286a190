"""Configuration files that are based on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from calib_guidance.errors import ConfigurationError

_OPTIONS = ("--config", "-c")


def _read(path: Path, above: tuple[Path, ...]) -> list[str]:
    """Values for ``--config``: the files that ``path`` is based on, and what it says itself."""
    if path.resolve() in above:
        raise ConfigurationError(f"{path} is based on itself, by way of {', '.join(map(str, above))}")
    if not path.is_file():
        raise ConfigurationError(
            f"{above[-1] if above else 'base'}: no such file: {path} (base is relative to the file that says it)"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return [str(path)]  # the parser's own message names file, line and column
    if not isinstance(content, dict) or "base" not in content:
        return [str(path)]
    bases = content.pop("base")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigurationError(
            f"{path}: base must be the path of a configuration file or a list of them, got {bases!r}"
        )
    files = [value for base in bases for value in _read(path.parent / base, (*above, path.resolve()))]
    return [*files, yaml.safe_dump(content, allow_unicode=True, sort_keys=False)] if content else files


def expand_bases(words: Sequence[str]) -> list[str]:
    """The words of a command with every configuration file preceded by those it is based on.

    A file may say ``base: FILE`` or ``base: [FILE, …]``, relative to itself; it then overrides these, as a later ``--config``
    would.

    Raises:
        ConfigurationError: a base that is missing, is not a path, or leads back to the file.
    """
    expanded: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option not in _OPTIONS or not (equals or words):
            expanded.append(word)
            continue
        value = value if equals else words.pop(0)
        values = _read(Path(value), ()) if "\n" not in value and Path(value).is_file() else [value]
        expanded += [word for each in values for word in ("--config", each)]
    return expanded
