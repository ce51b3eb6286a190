"""How many samples a difference takes: the tables of cost_of_a_number.md.

    python docs/cost_of_a_number.py
    python docs/cost_of_a_number.py --results docs/cifar10_scores.json --prefix cifar10_

Reads what tuned_scores.py keeps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from calib_guidance.experiments.experiment import insert
from calib_guidance.metrics.paired import samples_to_resolve

DOCS = Path(__file__).parent
METRICS = {
    "fd": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "classifier_accuracy": "accuracy",
    "integral_ece": "integral ECE",
}
METHOD, SIMILAR, OTHER = "js, Softplus", "tempered, Softplus", "plain, ReLU"


def rounded(count: float) -> str:
    """Two digits."""
    return f"{float(f'{count:.2g}'):,.0f}"


def spread(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Standard deviations over seeds of a difference: of runs that share their noise, and as if they did not."""
    apart = statistics.stdev(a - b for a, b in zip(values, others, strict=True))
    return apart, math.hypot(statistics.stdev(values), statistics.stdev(others))


def samples(methods: Mapping[str, Any], num_samples: int) -> str:
    """A row per metric: its deviation over seeds, and the samples that a difference of 5 % takes."""
    titles = ["metric", "value", "± of a run", "own noise", f"common noise, {SIMILAR}", f"common noise, {OTHER}"]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for key, label in METRICS.items():
        own = methods[METHOD]["confirmed"][key]
        value, std = statistics.mean(own), statistics.stdev(own)
        cells = [f"{value:.3f}", f"{std:.3f}", rounded(samples_to_resolve(value, std, num_samples))]
        for other in (SIMILAR, OTHER):
            # Of two runs with deviations of std each, own noise has a difference of √2·std.
            shared = spread(own, methods[other]["confirmed"][key])[0] / math.sqrt(2)
            cells.append(rounded(samples_to_resolve(value, shared, num_samples)))
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def gain(methods: Mapping[str, Any]) -> str:
    """A row per metric: how much shorter common noise makes an interval, over all pairs of guided methods."""
    guided = [method for method in methods if methods[method]["confirmed"]["integral_ece"][0] is not None]
    lines = ["| metric | pairs | median | least | most |", "|---" + "|---:" * 4 + "|"]
    for key, label in METRICS.items():
        ratios = []
        for one, two in combinations(guided, 2):
            shared, own = spread(methods[one]["confirmed"][key], methods[two]["confirmed"][key])
            if shared > 0:
                ratios.append(own / shared)
        cells = [str(len(ratios)), *(f"{value:.1f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description="How many samples a difference takes.")
    parser.add_argument("--results", type=Path, default=DOCS / "tuned_scores.json")
    parser.add_argument("--page", type=Path, default=DOCS / "cost_of_a_number.md")
    parser.add_argument("--prefix", default="", help="of the marks of the tables in the page")
    options = parser.parse_args(argv)
    kept = json.loads(options.results.read_text())
    for name, text in (
        ("samples", samples(kept["methods"], kept["num_samples"])),
        ("gain", gain(kept["methods"])),
    ):
        insert(text, options.prefix + name, options.page)
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
