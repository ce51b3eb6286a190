"""What the benchmarks share: forms that take turns, tables of ratios, and files of ratios for a later comparison."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from calib_guidance.backend.precision import bfloat16_instructions

BASELINE = Path(__file__).with_name("baseline.json")


class Ratio(NamedTuple):
    """A ratio over rounds; more is better.

    Attributes:
        median, low, high: over the rounds.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} … {self.high:.3g})"


def synchronize() -> None:
    """Wait for the device, where there is one that does not work in step with the program."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(forms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round, after one round that warms up.

    They take turns: a drift of the machine's speed meets all of them, and a ratio compares runs within one round.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(rounds + 1):
        for name, form in forms.items():
            synchronize()
            started = time.perf_counter()
            form()
            synchronize()
            if round_:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Round by round."""
    return Ratio.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def machine() -> str:
    """What the ratios were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = f"{platform.machine()} with {bfloat16_instructions() or torch.backends.cpu.get_cpu_capability()}"
    return f"{len(os.sched_getaffinity(0))} cores of {kind}, {torch.get_num_threads()} threads"


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--rounds", type=int, default=rounds, help="timed rounds (%(default)s)")
    found.add_argument("--json", type=Path, help="file to add the ratios to, for benchmarks/compare.py")
    return found


def keep(path: Path | None, benchmark: str, ratios: Mapping[str, Ratio]) -> None:
    """Put the ratios of a benchmark into a file, in place of those that it has of it."""
    if path is None:
        return
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[benchmark] = {
        "machine": machine(),
        "torch": torch.__version__,
        "ratios": {name: [round(v, 5) for v in value[:3]] + [value.rounds] for name, value in ratios.items()},
    }
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
