"""Whether something got slower: ratios that benchmarks wrote with ``--json`` against those of ``baseline.json``.

    python benchmarks/sampling_step.py --json new.json && python benchmarks/compare.py new.json

A ratio is the time of one form over that of another; both took turns on one machine, and more is better. A result is slower if it
lies below the range of the baseline, by more than a tenth of its median. Ratios differ between kinds of processors, too: what is
lower than on another kind is printed and does not fail.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from timing import BASELINE, Ratio

_TOLERANCE = 0.1


def slower(before: Ratio, now: Ratio) -> bool:
    """Whether a ratio is worse than noise explains."""
    return now.high < before.low and now.median < (1 - _TOLERANCE) * before.median


def main() -> None:
    """Print the table; exit with status 1 where something got slower on the same kind of machine."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("new", type=Path, help="file that --json wrote")
    options.add_argument("--baseline", type=Path, default=BASELINE, help="(%(default)s)")
    found = options.parse_args()
    baseline, new = json.loads(found.baseline.read_text()), json.loads(found.new.read_text())
    worse, elsewhere, rows = [], [], []
    for benchmark, result in sorted(new.items()):
        known = baseline.get(benchmark, {"ratios": {}, "machine": "–"})
        rows.append(f"| **{benchmark}** ({known['machine']} → {result['machine']}) | | | |")
        for name, values in result["ratios"].items():
            now = Ratio(*values)
            if name not in known["ratios"]:
                rows.append(f"| {name} | – | {now} | new |")
                continue
            before = Ratio(*known["ratios"][name])
            if slower(before, now):
                same = known["machine"] == result["machine"]
                (worse if same else elsewhere).append(
                    f"{benchmark}: {name} is {now.median / before.median:.2f} of what it was"
                )
            rows.append(f"| {name} | {before} | {now} | {now.median / before.median:.2f} |")
        gone = known["ratios"].keys() - result["ratios"].keys()
        rows += [f"| {name} | {Ratio(*known['ratios'][name])} | – | gone |" for name in sorted(gone)]
    rows += [f"| **{benchmark}** (not measured now) | | | |" for benchmark in sorted(baseline.keys() - new.keys())]
    print("| ratio, more is better | baseline | now | now / baseline |\n|---|---:|---:|---:|")
    print("\n".join(rows))
    if elsewhere:
        print("\nlower than on the other kind of machine:\n" + "\n".join(f"  {line}" for line in elsewhere))
    if worse:
        raise SystemExit("slower:\n" + "\n".join(f"  {line}" for line in worse))
    if not elsewhere:
        print("\nnothing got slower")


if __name__ == "__main__":
    main()
