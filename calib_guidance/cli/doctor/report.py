"""Printed findings of the doctor."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

from calib_guidance.cli.lightning import innermost

_COLORS = {"ok": "32", "note": "33", "missing": "31", "wrong": "31"}


class Report:
    """Findings, printed as they come: the first line says what, further ones give cause and cure.

    Attributes:
        counts: number of findings by mark.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, mark: str, text: str, *more: str) -> None:
        self.counts[mark] += 1
        shown = f"\033[{_COLORS[mark]}m{mark:<7}\033[0m" if sys.stdout.isatty() else f"{mark:<7}"
        print(f"  {shown}  " + "\n           ".join([text, *more]), flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Report any exception as ``wrong``: parts that a user wrote may fail in any way."""
        try:
            yield
        except Exception as error:
            cause = innermost(error)
            self.add("wrong", f"{what}: {cause if isinstance(cause, ValueError | RuntimeError) else repr(cause)}")


def amount(number: float, units: tuple[str, ...] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """Text of a number of bytes, or of other units in steps of 1,000."""
    power = next((p for p in range(len(units)) if number < 1000 ** (p + 1)), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"


def duration(low: float, high: float) -> str:
    """Text of a range of seconds."""
    units = (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2), ("s", 1, 1), ("ms", 1e-3, 0))
    unit, length, _ = next(unit for unit in units if high >= unit[1] * unit[2])
    texts = dict.fromkeys(f"{float(f'{seconds / length:.3g}'):,g}" for seconds in (low, high))
    return f"{' to '.join(texts)} {unit}"
