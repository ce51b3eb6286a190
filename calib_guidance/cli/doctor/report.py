"""What is found, as a tired reader can take it in."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

from calib_guidance.cli.lightning import innermost

_COLOURS = {"ok": "32", "note": "33", "missing": "31", "wrong": "31"}


class Report:
    """What is found, printed as it is found: one line for what, further ones for cause and cure."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def add(self, mark: str, text: str, *more: str) -> None:
        self.counts[mark] += 1
        shown = f"\033[{_COLOURS[mark]}m{mark:<7}\033[0m" if sys.stdout.isatty() else f"{mark:<7}"
        print(f"  {shown}  " + "\n           ".join([text, *more]), flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Makes ``wrong`` of whatever goes wrong: parts that a user wrote or named may fail in any way."""
        try:
            yield
        except Exception as error:
            cause = innermost(error)
            self.add(
                "wrong", f"{what}: {cause}" if isinstance(cause, ValueError | RuntimeError) else f"{what}: {cause!r}"
            )


def amount(number: float) -> str:
    """Text of so many bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float) -> str:
    """Text of so many seconds."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
