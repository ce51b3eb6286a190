"""Results of an experiment as Markdown tables, CSV files and plots."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.text import read_text
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments.runner import Run
from calib_guidance.experiments.schema import Column
from calib_guidance.experiments.settings import Plan, label_of, slug
from calib_guidance.plots import ablation, precision_recall

_METRICS = ("metrics.json", "evaluation/metrics.json")  # later ones override


def read_value(column: Column, folder: Path) -> float | None:
    """The value of a column that a run measured, or None."""
    found: dict[str, Any] = {}
    for file in (column.file,) if column.file else _METRICS:
        path = folder / file
        found |= json.loads(path.read_text()) if path.is_file() else {}
    value: Any = found
    for part in column.key.split("."):
        known = dict(enumerate(value)) if isinstance(value, list) else value or {}
        value = known.get(int(part) if isinstance(value, list) else part)
    return value


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the known values; None where there is none, or only one."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def cell(values: Sequence[float | None], column: Column) -> str:
    """Mean ± standard deviation over seeds, for a table."""
    known = [column.text(value) for value in mean_and_std(values) if value is not None]
    return " ± ".join(known) or "–"


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


def _write_csv(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_text(path, text.getvalue())


@dataclass
class Results:
    """Results of the runs of an experiment."""

    plan: Plan
    samples: dict[int, int]  # that each setting of the tables got
    runs: dict[tuple[int, int, int], Run]  # that are done, by setting, seed and number of samples

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
            cells += [cell(self.values(number, column), column) for column in table.columns]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def write_csv(self, folder: Path) -> None:
        """``settings.csv``, a line per setting with mean and standard deviation, and ``runs.csv``, a line per run."""
        experiment, columns = self.plan.experiment, self.plan.columns
        group = ["group"] if experiment.groups else []
        labels = [*group, *(experiment.axes or ["name"])]
        keys = [column.key for column in columns]
        names = [f"{c.file}:{c.key}" if c.file and keys.count(c.key) > 1 else c.key for c in columns]

        def start(number: int) -> list[str]:
            return [*(self.plan.settings[number].group for _ in group), *self._labels(number)]

        lines = [[*labels, "num_samples", *(f"{name}{end}" for name in names for end in ("", "_sd"))]]
        for number, count in self.samples.items():
            pairs = [mean_and_std(self.values(number, column)) for column in columns]
            lines.append([*start(number), count, *itertools.chain(*pairs)])
        _write_csv(folder / "settings.csv", lines)
        lines = [[*labels, "seed", "num_samples", *names, "folder"]]
        for (number, seed, count), run in sorted(self.runs.items()):
            values = [read_value(column, run.folder) for column in columns]
            lines.append([*start(number), seed, count, *values, run.folder])
        _write_csv(folder / "runs.csv", lines)

    def draw(self, folder: Path) -> list[Path]:
        """Metrics over each axis, the others at the best setting's values; with the most samples that all points have."""
        settings, axes, paths = self.plan.settings, self.plan.experiment.axes, []
        best = next(
            (settings[number] for number in self.order() if settings[number].labels.keys() == axes.keys()), None
        )
        for name, axis in axes.items() if best else ():
            others = {other: label for other, label in best.labels.items() if other != name}
            alike = [n for n in self.samples if settings[n].group == best.group and name in settings[n].labels]
            alike = [number for number in alike if others.items() <= settings[number].labels.items()]
            places = {label_of(value): value for value in axis.values}
            same = {number: settings[number].labels[name] for number in alike}
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
            titles = {column.key: column.title for column in self.plan.columns}
            if any(known for _, known in points):
                paths += ablation(points, title, folder / slug(name), held=held, labels=titles)
            if all({"precision", "recall"} <= known.keys() for _, known in points):
                paths += precision_recall(points, title, folder / f"{slug(name)}-precision-recall", held)
        return paths

    def link(self, folder: Path) -> None:
        """Links by name to the folders of the runs: ``runs/GROUP/NAME/seedN``."""
        for number, count in self.samples.items():
            setting = self.plan.settings[number]
            for seed in self.plan.experiment.seeds:
                link = folder / "runs" / slug(setting.group) / slug(setting.name) / f"seed{seed}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(self.runs[number, seed, count].folder.resolve())
