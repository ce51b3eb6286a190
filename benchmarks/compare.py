"""Whether something got slower: figures that benchmarks wrote with ``--json`` against those of ``baseline.json``.

    python benchmarks/sampling_step.py --json new.json && python benchmarks/compare.py new.json

All figures are ratios of two forms that took turns on one machine, of which more is better, so that another machine may be
compared with this one. Slower is what lies below the whole spread of the baseline, by more than a tenth of its median.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from timing import BASELINE, Figure

_TOLERANCE = 0.1


def slower(before: Figure, now: Figure) -> bool:
    """Whether a figure is worse than noise explains."""
    return now.high < before.low and now.median < (1 - _TOLERANCE) * before.median


def main() -> None:
    """Print the table; exit with status 1 where something got slower."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("new", type=Path, help="file that --json wrote")
    options.add_argument("--baseline", type=Path, default=BASELINE, help="(%(default)s)")
    found = options.parse_args()
    baseline, new = json.loads(found.baseline.read_text()), json.loads(found.new.read_text())
    worse, rows = [], []
    for benchmark, result in sorted(new.items()):
        known = baseline.get(benchmark, {"figures": {}, "machine": "–"})
        rows.append(f"| **{benchmark}** ({known['machine']} → {result['machine']}) | | | |")
        for name, values in result["figures"].items():
            now = Figure(*values)
            if name not in known["figures"]:
                rows.append(f"| {name} | – | {now} | new |")
                continue
            before = Figure(*known["figures"][name])
            if slower(before, now):
                worse.append(f"{benchmark}: {name} is {now.median / before.median:.2f} of what it was")
            rows.append(f"| {name} | {before} | {now} | {now.median / before.median:.2f} |")
        gone = known["figures"].keys() - result["figures"].keys()
        rows += [f"| {name} | {Figure(*known['figures'][name])} | – | gone |" for name in sorted(gone)]
    rows += [f"| **{benchmark}** (not measured now) | | | |" for benchmark in sorted(baseline.keys() - new.keys())]
    print("| figure, more is better | baseline | now | now / baseline |\n|---|---:|---:|---:|")
    print("\n".join(rows))
    if worse:
        raise SystemExit("slower:\n" + "\n".join(f"  {line}" for line in worse))
    print("\nnothing got slower")


if __name__ == "__main__":
    main()
