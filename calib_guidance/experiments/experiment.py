"""``calib-guidance experiment --config FILE``: many runs, with several seeds each, as tables and plots."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.distributed import available_cores
from calib_guidance.backend.text import read_text
from calib_guidance.cli.configs import find_configuration
from calib_guidance.cli.parsed import quietly, without_network
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments.objectives import parse_objective
from calib_guidance.experiments.runner import Run, do_runs
from calib_guidance.experiments.schema import Column
from calib_guidance.experiments.settings import Plan, label_of, make_plan, slug
from calib_guidance.plots import ablation, precision_recall

_METRICS = ("metrics.json", "evaluation/metrics.json")  # later ones override


def read_value(column: Column, folder: Path) -> float | None:
    """The value of a column that a run measured, or None."""
    value: Any = {}
    for path in (folder / file for file in ((column.file,) if column.file else _METRICS)):
        value |= json.loads(path.read_text()) if path.is_file() else {}
    for part in column.key.split("."):
        known = {str(number): each for number, each in enumerate(value)} if isinstance(value, list) else value or {}
        value = known.get(part)
    return value


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the known values; None where there is none, or only one."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def place_of(mark: str, path: Path) -> tuple[str, str]:
    """What stands before and after the table with that mark in a Markdown file, marks included."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = read_text(path).partition(opening)
    _, end, after = rest.partition(closing)
    if not end:
        raise ConfigurationError(f"{path} has no place for the table: put {opening} and {closing} where it belongs")
    return before + opening, closing + after


def insert(text: str, mark: str, path: Path) -> None:
    """Put a table between its marks in a Markdown file."""
    before, after = place_of(mark, path)
    write_text(path, f"{before}\n{text}\n{after}")


def halve(
    settings: Sequence[int],
    rungs: Sequence[int],
    factor: int,
    measure: Callable[[Sequence[int], int], Sequence[float]],
    group_of: Callable[[int], str] = lambda setting: "",
) -> dict[int, int]:
    """Successive halving (Jamieson & Talwalkar 2016): measure all settings on few samples, and the best on more.

    One in ``factor`` settings is promoted to the next of the ascending ``rungs``, and at least one; ties are promoted together.
    All settings of a rung are measured before any is dropped, so the result does not depend on which run ends first.
    ``measure`` says what the settings of a rung are ranked by with its samples, lowest is best. Settings compete within their
    group: every group gets the same number of samples.

    Returns:
        The number of samples that each setting got.
    """
    samples, alive = {}, list(settings)
    for rung in rungs:
        values = dict(zip(alive, measure(alive, rung), strict=True))
        samples |= dict.fromkeys(alive, rung)
        groups = {
            group_of(number): [other for other in alive if group_of(other) == group_of(number)] for number in alive
        }
        last = {name: sorted(map(values.get, each))[max(1, len(each) // factor) - 1] for name, each in groups.items()}
        alive = [number for number in alive if values[number] <= last[group_of(number)]]
    return samples


class Experimenter:
    """Does the runs of an experiment below the folder ``output``, and puts their values into tables, files and plots.

    ``workers`` and ``devices`` are those of :func:`do_runs`.
    """

    def __init__(self, plan: Plan, output: Path, workers: int = 1, devices: Sequence[str] = ()):
        self.plan, self.output, self.workers, self.devices = plan, output, workers, devices
        self.runs: dict[tuple[int, int, int], Run] = {}  # that are done, by setting, seed and number of samples
        self.samples: dict[int, int] = {}  # that each setting of the tables got
        self.made = 0  # how many of the runs this object did

    def make(self, settings: Sequence[int], num_samples: int) -> None:
        """Do what is left of the runs of some settings; SystemExit where some failed."""
        runs = self.plan.runs(settings, num_samples, self.output)
        todo = list({run.folder: run for run in runs if not run.done()}.values())
        before = f"{num_samples} samples, " if num_samples else ""
        before += f"{len({run.folder for run in runs}) - len(todo)} runs done before"
        if failed := do_runs(todo, self.workers, self.devices, before):
            logs = ", ".join(str(run.folder / "log.txt") for run in failed[:3])
            failures = f"{len(failed)} of {len(runs)} runs failed. Logs: {logs}"
            raise SystemExit(f"{failures}. Re-run the command to do what is left")
        self.made += len(todo)
        self.runs |= {(run.setting, run.seed, num_samples): run for run in runs if run.setting in settings}

    def rank(self, settings: Sequence[int], num_samples: int) -> list[float]:
        """Mean over seeds of what settings are ranked by, negative where higher is better."""
        halving = self.plan.experiment.halving
        text = halving.rank_by(num_samples, self.plan.experiment.num_samples)
        objective = parse_objective(text, self.plan.name)
        columns = {column.key: column for column in reversed(self.plan.columns) if column.key in objective.keys}
        sign = columns[objective.key].sign if objective.key in columns else None
        ranked = []
        for number in settings:
            means = {key: mean_and_std(self.values(number, column, num_samples)) for key, column in columns.items()}
            if any(None in self.values(number, column, num_samples) for column in columns.values()):
                name = self.plan.settings[number].name
                raise ConfigurationError(f"{name}: settings cannot be ranked by {text}: a run has no such value")
            ranked.append(objective.of({key: mean for key, (mean, _) in means.items()}, sign))
        return ranked

    def run(self, rows: Sequence[int] = ()) -> None:
        """Run the complete experiment, or some rows of it (without halving)."""
        num_samples, halving = self.plan.experiment.num_samples, self.plan.experiment.halving
        settings = rows or range(len(self.plan.settings))

        def measure(asked: Sequence[int], num_samples: int) -> list[float]:
            self.make(asked, num_samples)
            return self.rank(asked, num_samples)

        if halving is None or rows:
            self.make(settings, num_samples)
            self.samples = dict.fromkeys(settings, num_samples)
        else:
            methods = self.plan.experiment.tune is not None  # compete among themselves first
            group_of = (lambda number: self.plan.settings[number].group) if methods else (lambda number: "")
            self.samples = halve(settings, halving.rungs(num_samples), halving.factor, measure, group_of)

    def values(self, setting: int, column: Column, num_samples: int | None = None) -> list[float | None]:
        """A value of a setting, by seed."""
        count = self.samples[setting] if num_samples is None else num_samples
        seeds = self.plan.experiment.seeds
        return [read_value(column, self.runs[setting, seed, count].folder) for seed in seeds]

    def order(self) -> list[int]:
        """Settings from the best to the worst: by samples that they got, then by the first column."""
        column = self.plan.columns[0]

        def place(number: int) -> tuple[int, float]:
            mean, _ = mean_and_std(self.values(number, column))
            return -self.samples[number], float("inf") if mean is None else column.sign * mean

        return sorted(self.samples, key=place)

    def _labels(self, number: int) -> list[str]:
        setting = self.plan.settings[number]
        return [setting.labels.get(axis, "") for axis in self.plan.experiment.axes or ["name"]]

    def markdown(self, mark: str) -> str:
        """A table: mean ± standard deviation over seeds of each setting; those that halving stopped earlier come last."""
        experiment, table = self.plan.experiment, self.plan.experiment.tables[mark]
        labels = [axis.title or name for name, axis in experiment.axes.items()] or [table.title]
        counted = ["samples"] if experiment.halving else []
        titles = [*labels, *counted, *(column.title for column in table.columns)]
        lines = [f"| {' | '.join(titles)} |", "|---" * len(labels) + "|" + "---:|" * (len(titles) - len(labels))]
        group = ""
        for number in self.order() if experiment.halving else self.samples:
            if self.plan.settings[number].group != group:
                group = self.plan.settings[number].group
                lines.append(f"| **{group}** |" + " |" * (len(titles) - 1))
            cells = self._labels(number) + ([f"{self.samples[number]:,}"] if counted else [])
            for column in table.columns:  # mean ± standard deviation
                known = [column.text(v) for v in mean_and_std(self.values(number, column)) if v is not None]
                cells.append(" ± ".join(known) or "–")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def write(self, folder: Path, into: Path | None) -> None:
        """Write tables, CSV files, plots, and links by name to the folders of the runs, and print the tables."""
        plan, paths = self.plan, []
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for mark in plan.experiment.tables:
            text = self.markdown(mark)
            paths.append(folder / f"{mark}.md")
            write_text(paths[-1], text + "\n")
            print(f"\n{text}")
            if into is not None:
                insert(text, mark, into)
        for column in plan.columns:
            if all(value is None for number in self.samples for value in self.values(number, column)):
                print(f"note: no run has {column.key} in {column.file or 'metrics.json'}, for column {column.title!r}")
        self._write_csv(folder)
        for (number, count), seed in itertools.product(self.samples.items(), plan.experiment.seeds):
            setting = plan.settings[number]
            link = folder / "runs" / slug(setting.group) / slug(setting.name) / f"seed{seed}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.runs[number, seed, count].folder.resolve())
        paths += [folder / "settings.csv", folder / "runs.csv", *self._draw(folder / "plots")]
        print(f"\nbest by {plan.columns[0].key}: {plan.settings[self.order()[0]].name}")
        print("wrote", *paths, sep="\n  ")

    def _write_csv(self, folder: Path) -> None:
        """``settings.csv``, a line per setting with mean and standard deviation, and ``runs.csv``, a line per run."""
        experiment, columns = self.plan.experiment, self.plan.columns
        keys = [column.key for column in columns]
        names = [f"{c.file}:{c.key}" if c.file and keys.count(c.key) > 1 else c.key for c in columns]
        labels = [*(["group"] if experiment.groups else []), *(experiment.axes or ["name"])]

        def start(number: int) -> list[str]:
            return [*([self.plan.settings[number].group] if experiment.groups else []), *self._labels(number)]

        per_setting = [[*labels, "num_samples", *(f"{name}{end}" for name in names for end in ("", "_sd"))]]
        for number, count in self.samples.items():
            pairs = [mean_and_std(self.values(number, column)) for column in columns]
            per_setting.append([*start(number), count, *itertools.chain(*pairs)])
        per_run = [[*labels, "seed", "num_samples", *names, "folder"]]
        for (number, seed, count), run in sorted(self.runs.items()):
            values = [read_value(column, run.folder) for column in columns]
            per_run.append([*start(number), seed, count, *values, run.folder])
        for name, lines in (("settings.csv", per_setting), ("runs.csv", per_run)):
            text = io.StringIO()
            csv.writer(text).writerows(lines)
            write_text(folder / name, text.getvalue())

    def _draw(self, folder: Path) -> list[Path]:
        """Metrics over each axis, the others at the best setting's values; with the most samples that all points have."""
        settings, axes, paths = self.plan.settings, self.plan.experiment.axes, []
        titles = {column.key: column.title for column in self.plan.columns}
        best = [settings[number] for number in self.order() if settings[number].labels.keys() == axes.keys()][:1]
        for setting, (name, axis) in itertools.product(best, axes.items()):
            others = {other: label for other, label in setting.labels.items() if other != name}
            alike = [n for n in self.samples if settings[n].group == setting.group and name in settings[n].labels]
            places = {label_of(value): value for value in axis.values}
            same = {n: settings[n].labels[name] for n in alike if others.items() <= settings[n].labels.items()}
            same = {number: label for number, label in same.items() if axis.configs or label in places}
            if len(same) < 2:
                continue
            numeric = axis.values and all(type(value) in (int, float) for value in axis.values)
            count = min(self.samples[number] for number in same)
            points = []
            for number, label in same.items():
                found = {c.key: mean_and_std(self.values(number, c, count)) for c in self.plan.columns}
                known = {key: pair for key, pair in found.items() if pair[0] is not None}
                points.append((float(places[label]) if numeric else label, known))
            title, held = axis.title or name, ", ".join(f"{other}={label}" for other, label in others.items())
            if any(known for _, known in points):
                paths += ablation(points, title, folder / slug(name), held=held, labels=titles)
            if all({"precision", "recall"} <= known.keys() for _, known in points):
                paths += precision_recall(points, title, folder / f"{slug(name)}-precision-recall", held)
        return paths


def devices_of(text: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be, one after the other: what was asked for, or every visible device."""
    if text is not None:
        return [name for name in text.split(",") if name]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else map(str, itertools.count())
    return list(itertools.islice(names, torch.cuda.device_count()))


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="calib-guidance experiment", description="Many runs as tables and plots. Re-running skips completed runs."
    )
    add = parser.add_argument
    add("--config", required=True, help="experiment file or its name, e.g. digits_tau2")
    add("--output", type=Path, default=Path("outputs/experiments"), help="folder of all experiments (%(default)s)")
    add("--row", action="append", default=[], help="run only this row, e.g. gamma=0.3; may be repeated")
    add("--into", type=Path, help="Markdown file to put the tables into, between <!-- MARK --> and <!-- /MARK -->")
    add("--workers", type=int, help="runs at a time (one per GPU; on a CPU one per core, at most 4)")
    add("--devices", help="GPUs, e.g. 0,1,3 (default: CUDA_VISIBLE_DEVICES, or all); a run uses one")
    add("--dry-run", action="store_true", help="check the experiment, print the commands of its runs, run nothing")
    options = parser.parse_args(list(argv))
    if options.row and options.into:
        parser.error("--into takes complete tables: remove --row")
    return options


def experiment(argv: Sequence[str]) -> None:
    """``calib-guidance experiment``: do the runs of an experiment, print its tables and draw its plots.

    Writes tables, ``settings.csv``, ``runs.csv``, ``plots/`` and links by name to the runs, which are in ``OUTPUT/runs/``, into
    ``OUTPUT/NAME``, with ``--row`` into ``OUTPUT/NAME/rows``. Exit status 1 where runs failed.
    """
    options = _options(argv)
    started = time.monotonic()
    with quietly():
        plan = make_plan(find_configuration(options.config, "experiment"))
    rows = plan.select(options.row)
    if options.dry_run:
        for run in plan.runs(rows or range(len(plan.settings)), plan.experiment.num_samples, options.output):
            setting = plan.settings[run.setting]
            print(f"# {' / '.join(filter(None, (setting.group, setting.name)))}, seed {run.seed}")
            print("\n".join(shlex.join(["calib-guidance", *command]) for command in run.commands))
        return
    for mark in plan.experiment.tables if options.into else ():
        place_of(mark, options.into)  # before the runs
    with without_network():
        plan.check_files()
    devices = devices_of(options.devices)
    workers = options.workers or len(devices) or min(available_cores(), 4)
    experimenter = Experimenter(plan, options.output, workers, devices)
    experimenter.run(rows)
    experimenter.write(options.output / plan.name / ("rows" if rows else ""), options.into)
    print(f"{experimenter.made} runs in {(time.monotonic() - started) / 60:.1f} minutes")
