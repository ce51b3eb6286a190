"""Every guidance of digits at its own best: the table and the plot of which_guidance.md.

    calib-guidance tune --config digits_rules
    calib-guidance tune --config digits_autoguidance
    python docs/which_guidance.py outputs/experiments/digits_rules outputs/experiments/digits_autoguidance

What the searches found is kept in ``which_guidance.json``, with the evaluations that each method needs. Without folders the page
is only drawn again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from calib_guidance.backend.atomic import write_text
from calib_guidance.cli.configs import find_configuration
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI, quietly, without_network
from calib_guidance.denoisers import Combination, Denoiser
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.experiments.experiment import insert
from calib_guidance.experiments.settings import make_plan
from calib_guidance.plots import COLORS, paper

DOCS = Path(__file__).parent
METRICS = {"fd": "Fréchet ↓", "precision": "precision ↑", "recall": "recall ↑", "classifier_accuracy": "accuracy ↑"}
ON_TOP = " + js"
NONE = "no guidance"


class Method(NamedTuple):
    """A method at its best; lists are over the fresh seeds."""

    model: str  # conditional or unconditional
    name: str
    best: str
    values: dict[str, list[float]]  # by metric
    evaluations: float  # of diffusion networks, per step
    gradients: float  # of the classifier, per step

    @property
    def is_guided(self) -> bool:
        """By a classifier on top of, or in place of, combined predictions."""
        return self.gradients > 0

    @property
    def base(self) -> str:
        """The name without the classifier on top."""
        return self.name.removesuffix(ON_TOP)


def evaluations(denoiser: Denoiser, levels: NoiseLevels) -> float:
    """NFE per step; a combination has that of its model outside its interval."""
    if not isinstance(denoiser, Combination):
        return float(denoiser.nfe)
    active = statistics.mean(map(float, denoiser.interval.active(levels)))
    return active * denoiser.nfe + (1 - active) * evaluations(denoiser.denoiser, levels)


def collect(folder: Path, config: Path | None = None) -> dict[str, Any]:
    """What ``tune`` found, by method, and the evaluations that each best setting needs."""
    found = json.loads((folder / "tune.json").read_text())
    with quietly():
        plan = make_plan(config or find_configuration(folder.name, "tune"), "tune")
    numbers = {(setting.group, setting.name): number for number, setting in enumerate(plan.settings)}
    methods = {}
    for method, each in found["methods"].items():
        run = plan.runs([numbers[method, each["best"]]], found["num_samples"], folder.parent)[0]
        with quietly(), without_network():
            cli = run_lightning(list(run.commands[0]), ParsedCLI)
            model = cli.build("model", cli.options.model)
        levels = model.sampler.levels(model.denoiser)
        plan_of = model.guidance and model.guidance.plan(levels)
        methods[method] = {
            "best": each["best"],
            "evaluations": evaluations(model.denoiser, levels),
            "gradients": 0.0 if plan_of is None else statistics.mean(map(float, plan_of.active)),
            **{key: each["confirmed"][key] for key in METRICS},
        }
    return {"num_samples": found["num_samples"], "seeds": found["confirmation_seeds"], "methods": methods}


def read(path: Path) -> list[Method]:
    """The methods of ``which_guidance.json``: the conditional model first, then in order of Fréchet distance."""
    methods = []
    for title, each in json.loads(path.read_text())["methods"].items():
        model, _, name = title.partition(": ")
        values = {key: each[key] for key in METRICS}
        methods.append(Method(model, name, each["best"], values, each["evaluations"], each["gradients"]))
    return sorted(methods, key=lambda method: (method.model, statistics.mean(method.values["fd"])))


def mean(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(methods: Sequence[Method], num_samples: int) -> str:
    """One row per method. Differences are of pairs of one seed, with their standard error."""
    titles = ["guidance", "tuned", *METRICS.values(), f"Fréchet less that of {NONE}", "NFE, gradients per step"]
    lines = [f"| {' | '.join(titles)} |", "|---|---" + "|---:" * (len(titles) - 2) + "|"]
    plain = {method.model: method for method in methods if method.name == NONE}
    model = None
    for method in methods:
        if method.model != model:
            model = method.model
            lines.append(f"| **{model} model** |" + " |" * (len(titles) - 1))
        cells = [mean(values, 2 if key == "fd" else 3) for key, values in method.values.items()]
        difference = "–"
        if method.name != NONE and method.model in plain:
            pairs = zip(method.values["fd"], plain[method.model].values["fd"], strict=True)
            apart = [own - other for own, other in pairs]
            difference = f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}"
        tuned = "–" if method.name == NONE else method.best.replace("=", " = ")
        cost = f"{method.evaluations:.3g}, {method.gradients:.3g}"
        lines.append(f"| {' | '.join([method.name, tuned, *cells, difference, cost])} |")
    seeds = len(methods[0].values["fd"])
    note = f"Mean ± standard deviation over {seeds} seeds that the search did not see, {num_samples} samples each."
    return "\n".join([*lines, "", f"{note} Differences: ± standard error."])


@paper
def draw(methods: Sequence[Method], path: Path) -> None:
    """Precision over recall, a panel per model: open marks alone, filled ones with a classifier, joined where both are there."""
    models = list(dict.fromkeys(method.model for method in methods))
    bases = list(dict.fromkeys(method.base for method in methods))
    # Six colors that are dark enough for lines, with other markers each time; black is for no guidance.
    styles = {
        base: {"color": COLORS[k % 6], "marker": "os^Dv<>P"[(k % 6 + k // 6) % 8]} for k, base in enumerate(bases)
    }
    if NONE in styles:
        styles[NONE] = {"color": COLORS[6], "marker": "*", "ms": 8}
    legend = 0.145 * (-(-len(bases) // 2) + 1) + 0.1  # inch
    height = 3.0 + legend
    figure = Figure(figsize=(6.0, height), layout="none")
    axes = figure.subplots(1, len(models), squeeze=False, gridspec_kw={"wspace": 0.28})[0]
    figure.subplots_adjust(left=0.1, right=0.985, top=1 - 0.22 / height, bottom=(legend + 0.5) / height)
    for axis, model in zip(axes, models, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for method in (method for method in methods if method.model == model):
            (x, dx), (y, dy) = (
                (statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5)
                for values in (method.values["recall"], method.values["precision"])
            )
            style = styles[method.base]
            fill = {} if method.is_guided else {"mfc": "white"}
            axis.errorbar(x, y, dy, dx, elinewidth=0.5, ls="", zorder=3, **{"ms": 5} | style | fill)
            points.setdefault(method.base, []).append((x, y))
        for base, pair in points.items():
            axis.plot(*zip(*pair, strict=True), lw=0.6, color=styles[base]["color"], zorder=2)
        axis.set(xlabel="recall ↑", ylabel="precision ↑" if axis is axes[0] else "")
        axis.set_title(f"{model} model", loc="left")
        axis.margins(0.08)
    entries = [Line2D([], [], ls="", **{"ms": 5} | styles[base]) for base in bases]
    figure.legend(
        entries, bases, loc="lower center", ncols=2, fontsize=8, handletextpad=0.2, labelspacing=0.25,
        title="open: alone; filled: with a classifier; bars: standard error", title_fontsize=8,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Every guidance of digits at its own best.")
    parser.add_argument("folders", type=Path, nargs="*", help="what tune wrote, e.g. outputs/experiments/digits_rules")
    parser.add_argument("--page", type=Path, default=DOCS / "which_guidance.md", help="the page with the mark")
    parser.add_argument("--plot", type=Path, default=DOCS / "images/which_guidance.png")
    parser.add_argument("--results", type=Path, default=DOCS / "which_guidance.json", help="what is measured")
    options = parser.parse_args(argv)
    kept = json.loads(options.results.read_text()) if options.results.exists() else {"methods": {}}
    for folder in options.folders:
        new = collect(folder)
        same = ("num_samples", "seeds")
        if any(kept.get(key, new[key]) != new[key] for key in same):
            raise SystemExit(f"{folder} has other samples or seeds than {options.results}: measure all in the same way")
        kept = {**new, "methods": kept["methods"] | new["methods"]}
    if not kept["methods"]:
        raise SystemExit(f"{options.results} is not there: name the folders that calib-guidance tune wrote")
    write_text(options.results, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    methods = read(options.results)
    text = table(methods, kept["num_samples"])
    draw(methods, options.plot)
    insert(text, "which_guidance", options.page)
    print(text)


if __name__ == "__main__":
    main()
