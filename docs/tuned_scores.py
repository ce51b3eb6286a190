"""Every score at its own best: the tables of results.md and of the README, and a plot of all that was tried.

    calib-guidance tune --config digits_scores
    python docs/tuned_scores.py outputs/experiments/digits_scores
    calib-guidance tune --config cifar10_scores
    python docs/tuned_scores.py outputs/experiments/cifar10_scores --results docs/cifar10_scores.json --page docs/cifar10.md
    calib-guidance tune --config cifar10_joint
    python docs/tuned_scores.py outputs/experiments/cifar10_joint --results docs/cifar10_joint.json --page docs/cifar10.md

What the search found is kept in ``tuned_scores.json``, or the file of ``--results``, whose name marks the tables in pages.
Without a folder, tables and plot are only made again. A page with the mark ``NAME_strength`` also has a table of the candidates
by accuracy, and the plot is of FD over accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import write_text
from calib_guidance.experiments.experiment import insert
from calib_guidance.plots.fronts import fronts

DOCS = Path(__file__).parent
METRICS = {
    "fd": "FD ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "classifier_accuracy": "accuracy ↑",
    "integral_ece": "integral ECE ↓",
}
REFERENCES = ("plain, Softplus", "plain")  # what the scores of the papers are compared with, at its best as they are
ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the evaluation classifier on samples: how strong guidance is
UNGUIDED = "unguided"


def mean(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference of pairs of one seed ± its standard error."""
    apart = [own - other for own, other in zip(values, others, strict=True)]
    return f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}"


def table(methods: Mapping[str, Any], tuned: bool) -> str:
    """One row per method, unguided first, then in order of FD; with ``tuned`` settings and differences."""
    reference = next(name for name in REFERENCES if name in methods)
    titles = ["guidance", *(["tuned"] if tuned else []), *METRICS.values()]
    titles += [f"FD less that of {reference}"] if tuned else []
    lines = [f"| {' | '.join(titles)} |", "|---" * (1 + tuned) + "|---:" * (len(titles) - 1 - tuned) + "|"]
    fd = {method: statistics.mean(each["confirmed"]["fd"]) for method, each in methods.items()}
    for method in sorted(methods, key=lambda method: (method != UNGUIDED, fd[method])):
        values = methods[method]["confirmed"]
        measured = (values.get(key) for key in METRICS)
        cells = [
            mean(some, 2 if key == "fd" else 3) if some and None not in some else "–"
            for key, some in zip(METRICS, measured, strict=True)
        ]
        if tuned:
            best = "–" if method == UNGUIDED else methods[method]["best"].replace("=", " = ")
            difference = "–" if method == reference else paired(values["fd"], methods[reference]["confirmed"]["fd"])
            cells = [best, *cells, difference]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def first_rung(method: Mapping[str, Any]) -> list[dict[str, float]]:
    """The metrics of every candidate with the fewest samples, which all have."""
    return [min(tried["metrics"].items(), key=lambda item: int(item[0]))[1] for tried in method["tried"]]


def at_strength(methods: Mapping[str, Any]) -> str:
    """The lowest FD of a method's candidates that guide at least so strongly, all with the same number of samples."""
    found = {method: first_rung(each) for method, each in methods.items()}
    most = max(metrics["classifier_accuracy"] for some in found.values() for metrics in some)
    levels = [level for level in ACCURACIES if level <= most]
    lines = [f"| {' | '.join(['lowest FD with an accuracy of at least', *map(str, levels)])} |"]
    lines.append("|---" + "|---:" * len(levels) + "|")
    for method, some in found.items():
        cells = [method]
        for level in levels:
            fd = [metrics["fd"] for metrics in some if metrics["classifier_accuracy"] >= level]
            cells.append(f"{min(fd):.2f} ({len(fd)})" if fd else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(methods: Mapping[str, Any], path: Path, x: str, y: str) -> None:
    """Every candidate of the search's first rung: a metric over another, and a line through the best of each method."""
    points = {method: [(each[x], each[y]) for each in first_rung(some)] for method, some in methods.items()}
    signs = [1 if key == "fd" else -1 for key in (x, y)]
    for made in fronts(points, (METRICS[x], METRICS[y]), signs, path, "all candidates"):
        if made.suffix == ".pdf":
            made.unlink()


def collect(folder: Path) -> dict[str, Any]:
    """What ``tune`` found."""
    found = json.loads((folder / "tune.json").read_text())
    keys = ("best", "confirmed", "tried")
    methods = {method: {key: each[key] for key in keys} for method, each in found["methods"].items()}
    return {"num_samples": found["num_samples"], "seeds": found["confirmation_seeds"], "methods": methods}


def main(argv: Sequence[str] | None = None) -> None:
    """Make tables and plot, of a folder if one is given."""
    parser = argparse.ArgumentParser(description="Every score at its own best.")
    parser.add_argument("folder", type=Path, nargs="?", help="what tune wrote, e.g. outputs/experiments/digits_scores")
    parser.add_argument("--results", type=Path, default=DOCS / "tuned_scores.json", help="what is measured")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md", help="page of the complete table")
    parser.add_argument(
        "--readme", type=Path, default=DOCS.parent / "README.md", help="page of the short table, where it has the mark"
    )
    parser.add_argument("--images", type=Path, default=DOCS / "images", help="folder of the plot")
    options = parser.parse_args(argv)
    if options.folder is not None:
        write_text(options.results, json.dumps(collect(options.folder), indent=1, ensure_ascii=False) + "\n")
    elif not options.results.exists():
        raise SystemExit(f"{options.results} is not there: name the folder that calib-guidance tune wrote")
    methods = json.loads(options.results.read_text())["methods"]
    mark = options.results.stem
    strength = f"{mark}_strength"
    by_strength = f"<!-- {strength} -->" in options.page.read_text()
    draw(
        methods,
        options.images / f"{mark}.png",
        *(("classifier_accuracy", "fd") if by_strength else ("recall", "precision")),
    )
    if by_strength:
        insert(at_strength(methods), strength, options.page)
    insert(table(methods, tuned=True), mark, options.page)
    if f"<!-- {mark} -->" in options.readme.read_text():
        insert(table(methods, tuned=False), mark, options.readme)
    print(table(methods, tuned=True))


if __name__ == "__main__":
    main()
