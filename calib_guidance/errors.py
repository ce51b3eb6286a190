"""Errors that the command line shows as one message, without a traceback."""

import difflib
import importlib.util
import math
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class where it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class ConfigurationError(ValueError):
    """Parts of a configuration that cannot go together, found before any work is done."""


class RunError(RuntimeError):
    """A run that ends early although its configuration is valid. Complete shards are kept; re-run to resume.

    Attributes:
        status: exit status of the command.
    """

    status = 1


class StoppedError(RunError):
    """A run that stopped early and cleanly; re-run to resume.

    Attributes:
        by_signal: whether a signal asked for it.
    """

    status = 4
    by_signal = False


class FailedSamplesError(RunError):
    """A complete run with failed samples."""

    status = 3


class OutOfMemoryError(RunError):
    """Not even the smallest batch fits into the memory."""


class CheckpointError(RuntimeError):
    """A weights file that is missing, unreadable or made for another architecture."""


def check_choice(option: str, value: object, known: Iterable[object]) -> None:
    """Raise ValueError where an option has none of its known values."""
    if value not in known:
        raise ValueError(f"{option}: unknown {value!r}; known: {', '.join(map(str, known))}")


def check_numbers(
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    null: str = "",
    **options: float | None,
) -> None:
    """Raise ValueError where an option is not a finite number in these bounds; None is allowed where ``null`` says what for."""
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    stated = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    for option, value in options.items():
        inside = value is not None and least <= value <= most and above < value < below and math.isfinite(value)
        if not inside and not (value is None and null):
            allowed = (stated or "a finite number") + (f", or null for {null}" if null else "")
            raise ValueError(f"{option} must be {allowed}, got {value}")


def check_installed(library: str, extra: str, what: str) -> None:
    """Raise ImportError where ``what`` needs a library that comes with an extra, and it is not installed."""
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{what} needs {library}, which is not installed: pip install 'calib-guidance[{extra}]'")


def closest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'NAME'?)`` with the known name that is most like a misspelled one; empty if none is."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
