"""λ and β of the Smooth ECE on noisy digits, as a plot: ``python docs/calibration_sweep.py RUNS.CSV``.

``make calibrate-sweep`` does the runs and calls this.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from calib_guidance.plots import COLORS

MEASURES = {
    "NLL": ("nll.overall",),
    "ECE, mean over noise levels": tuple(f"ece.by_level.{k}" for k in range(5)),
}
FORMS = {"per_sample": "per sample", "binned": "binned"}


def read(path: Path) -> dict[tuple[str, float, float], dict[str, list[float]]]:
    """Each measure of each run, by (form, λ, β)."""
    found: dict[tuple[str, float, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with open(path) as file:
        for row in csv.DictReader(file):
            form, weight, beta = row["form"], row["lambda"] or 0, row["beta"] or 0
            for measure, columns in MEASURES.items():
                value = statistics.mean(float(row[column]) for column in columns)
                found[form, float(weight), float(beta)][measure].append(value)
    return found


def draw(found: dict[tuple[str, float, float], dict[str, list[float]]], path: Path) -> None:
    """One panel for each measure and form, one line for each β, mean and standard deviation over seeds."""
    figure, axes = plt.subplots(len(MEASURES), len(FORMS), figsize=(6.2, 4.6), sharex=True, sharey="row")
    for row, measure in zip(axes, MEASURES, strict=True):
        baseline = found["none", 0.0, 0.0][measure]
        mean, spread = statistics.mean(baseline), statistics.stdev(baseline)
        for axis, (form, title) in zip(row, FORMS.items(), strict=True):
            axis.axhspan(mean - spread, mean + spread, color=COLORS[6], alpha=0.12, lw=0)
            axis.axhline(mean, color=COLORS[6], lw=1, ls="--", label="cross-entropy alone")
            for number, beta in enumerate(sorted({b for f, _, b in found if f == form})):
                weights = sorted({w for f, w, b in found if f == form and b == beta})
                values = [found[form, weight, beta][measure] for weight in weights]
                shifted = [weight * 1.06 ** (number - 1) for weight in weights]  # so that the bars can be told apart
                means, spreads = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
                style = {"color": COLORS[number], "marker": "os^"[number], "ms": 4, "lw": 1.2, "capsize": 2}
                axis.errorbar(shifted, means, spreads, label=f"β = {beta:g}", **style)
            axis.set_xscale("log")
            axis.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            if measure == next(iter(MEASURES)):
                axis.set_title(f"+ λ·Smooth ECE, {title}", fontsize=9)
            else:
                axis.set_xlabel("λ", fontsize=9)
        row[0].set_ylabel(measure, fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, -0.06), ncols=4, frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw(read(Path(sys.argv[1])), Path(__file__).parent / "images/calibration_sweep.png")
