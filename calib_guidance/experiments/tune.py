"""``calib-guidance tune --config FILE``: every method at its own best, found under an equal budget, confirmed on fresh seeds."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.distributed import available_cores
from calib_guidance.cli.configs import find_configuration
from calib_guidance.cli.parsed import quietly, without_network
from calib_guidance.experiments.experiment import Experimenter, devices_of, insert, mean_and_std, place_of
from calib_guidance.experiments.settings import Plan, make_plan
from calib_guidance.plots import fronts

_MARK = "tune"


class Tuner:
    """The search of a plan, and the confirmation of what it finds."""

    def __init__(self, plan: Plan, output: Path, workers: int = 1, devices: Sequence[str] = ()):
        self.plan, self.total = plan, plan.experiment.num_samples
        self.search = Experimenter(plan, output, workers, devices)
        fresh = dataclasses.replace(plan.experiment, seeds=plan.experiment.tune.confirm, halving=None)
        self.confirmation = Experimenter(dataclasses.replace(plan, experiment=fresh), output, workers, devices)
        self.best: dict[str, int] = {}  # setting by method

    def run(self) -> None:
        """Halve the candidates of every method, and run the best of each with the fresh seeds."""
        self.search.run()
        last = [number for number, count in self.search.samples.items() if count == self.total]
        for number, value in zip(last, self.search.rank(last, self.total), strict=True):
            method = self.plan.settings[number].group
            if method not in self.best or value < self.best[method][0]:
                self.best[method] = (value, number)
        self.best = {method: number for method, (_, number) in self.best.items()}
        self.confirmation.run(list(self.best.values()))

    def spent(self, method: str) -> int:
        """Samples that the search made for a method; settings that were promoted keep what they had."""
        seeds = len(self.plan.experiment.seeds)
        settings = self.plan.settings
        return seeds * sum(count for number, count in self.search.samples.items() if settings[number].group == method)

    def results(self) -> dict[str, Any]:
        """``tune.json``: by method the best setting, its metrics in the search and on fresh seeds, and every setting tried.

        The metrics of a setting are by number of samples, of each rung that it reached.
        """
        columns, found = self.plan.columns, {}
        for method, number in self.best.items():
            tried = []
            for other, count in self.search.samples.items():
                if self.plan.settings[other].group == method:
                    rungs = sorted({made for setting, _, made in self.search.runs if setting == other})
                    metrics = {
                        str(made): {c.key: mean_and_std(self.search.values(other, c, made))[0] for c in columns}
                        for made in rungs
                    }
                    tried.append({"setting": self.plan.settings[other].name, "samples": count, "metrics": metrics})
            found[method] = {
                "best": self.plan.settings[number].name,
                "samples": self.spent(method),
                "search": {c.key: self.search.values(number, c) for c in columns},
                "confirmed": {c.key: self.confirmation.values(number, c) for c in columns},
                "tried": tried,
            }
        experiment = self.plan.experiment
        return {
            "objective": experiment.halving.by,
            "num_samples": self.total,
            "search_seeds": experiment.seeds,
            "confirmation_seeds": experiment.tune.confirm,
            "methods": found,
        }

    def table(self) -> str:
        """Every method at its own best, on the fresh seeds, the best first."""
        columns, seeds = self.plan.columns, len(self.plan.experiment.tune.confirm)
        titles = ["method", "best setting", *(column.title for column in columns), "samples searched"]
        lines = [f"| {' | '.join(titles)} |", "|---|---" + "|---:" * (len(columns) + 1) + "|"]

        def place(method: str) -> float:
            mean, _ = mean_and_std(self.confirmation.values(self.best[method], columns[0]))
            return float("inf") if mean is None else columns[0].sign * mean

        for method in sorted(self.best, key=place):
            number = self.best[method]
            cells = [method, self.plan.settings[number].name]
            for column in columns:
                known = mean_and_std(self.confirmation.values(number, column))
                cells.append(" ± ".join(column.text(value) for value in known if value is not None) or "–")
            lines.append(f"| {' | '.join([*cells, f'{self.spent(method):,}'])} |")
        note = f"Mean ± standard deviation over {seeds} seeds that the search did not see; {self.total:,} samples each."
        return "\n".join([*lines, "", note])

    def draw(self, folder: Path) -> list[Path]:
        """Fronts of all candidates on the first rung, and of those that got all samples: numbers of samples do not mix."""
        columns, paths = {column.key: column for column in self.plan.columns}, []
        first = self.plan.columns[0].key
        rungs = self.plan.experiment.halving.rungs(self.total)
        for (x, y), count in itertools.product(
            (("recall", "precision"), ("classifier_accuracy", first)), (rungs[0], self.total)
        ):
            if not {x, y} <= columns.keys() or x == y:
                continue
            points: dict[str, list[tuple[float, float]]] = {}
            for number in sorted({setting for setting, _, made in self.search.runs if made == count}):
                pair = [mean_and_std(self.search.values(number, columns[key], count))[0] for key in (x, y)]
                if None not in pair:
                    points.setdefault(self.plan.settings[number].group, []).append(tuple(pair))
            if points:
                titles, signs = [columns[key].title for key in (x, y)], [columns[key].sign for key in (x, y)]
                paths += fronts(points, titles, signs, folder / f"{y}-{x}-{count}", f"{count:,} samples each")
        return paths


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="calib-guidance tune",
        description="The best scale (and other parameters) of every method: successive halving among as many candidates of each, "
        "on common noise, then a confirmation on seeds that the search never sees. Re-running skips completed runs.",
    )
    add = parser.add_argument
    add("--config", required=True, help="experiment file with tune, or its name, e.g. digits")
    add("--output", type=Path, default=Path("outputs/experiments"), help="folder of all experiments (%(default)s)")
    add("--into", type=Path, help="Markdown file to put the table into, between <!-- tune --> and <!-- /tune -->")
    add("--workers", type=int, help="runs at a time (one per GPU; on a CPU one per core, at most 4)")
    add("--devices", help="GPUs, e.g. 0,1,3 (default: CUDA_VISIBLE_DEVICES, or all); a run uses one")
    add("--dry-run", action="store_true", help="check the file and list the candidates of every method, run nothing")
    return parser.parse_args(list(argv))


def tune(argv: Sequence[str]) -> None:
    """``calib-guidance tune``, of the arguments after ``tune``.

    Writes ``tune.md``, ``tune.json`` and ``plots/`` into ``OUTPUT/NAME``; runs are in ``OUTPUT/runs/``. Exit status 1 where runs
    failed.
    """
    options, started = _options(argv), time.monotonic()
    with quietly():
        plan = make_plan(find_configuration(options.config, "tune"), "tune")
    if options.into:
        place_of(_MARK, options.into)  # before the runs
    if options.dry_run:
        for setting in plan.settings:
            print(f"{setting.group}: {setting.name}")
        return
    with without_network():
        plan.check_files()
    devices = devices_of(options.devices)
    tuner = Tuner(plan, options.output, options.workers or len(devices) or min(available_cores(), 4), devices)
    tuner.run()
    folder, text = options.output / plan.name, tuner.table()
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    write_text(folder / "tune.md", text + "\n")
    write_text(folder / "tune.json", json.dumps(tuner.results(), indent=1, ensure_ascii=False) + "\n")
    if options.into:
        insert(text, _MARK, options.into)
    paths = [folder / "tune.md", folder / "tune.json", *tuner.draw(folder / "plots")]
    print(f"\n{text}\nwrote", *paths, sep="\n  ")
    made = tuner.search.made + tuner.confirmation.made
    print(f"{made} runs in {(time.monotonic() - started) / 60:.1f} minutes")
