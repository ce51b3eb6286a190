"""The settings of an experiment and their runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from calib_guidance.cli.configs import find_configuration
from calib_guidance.cli.lightning import subclasses_listed_once
from calib_guidance.cli.parse_once import parts_parsed_once
from calib_guidance.cli.parsed import without_network
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.experiments.resolve import (
    PLACES,
    Command,
    Resolver,
    check_evaluation,
    check_files,
    digest_of,
    evaluate_argv,
)
from calib_guidance.experiments.runner import Run
from calib_guidance.experiments.schema import Axis, Column, Experiment, Row, Stage, read_experiment
from calib_guidance.runs.store import file_hash, sha256


def slug(text: str) -> str:
    """A name as that of a folder: lower case, without spaces."""
    return re.sub(r"[^\w.=+]+", "-", text.lower()).strip("-")


def label_of(value: object) -> str:
    """A value of an axis as text."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Setting:
    """One setting of an experiment."""

    group: str  # that it is in; empty without groups
    labels: Mapping[str, str]  # its row's name, or the label of its value by axis
    name: str  # ``γ=0.3, scale=2``, or that of the row
    commands: tuple[Command, ...]  # of its runs, one after the other
    options: tuple[Namespace, ...]  # resolved configuration of each command
    digest: str  # hash of all that its results depend on, but seed and number of samples
    needs: int | None = None  # index of the setting that must be done before it


@dataclass(frozen=True)
class Plan:
    """An experiment with its settings resolved: rows, then the grid, in each group."""

    name: str  # of the file
    experiment: Experiment
    settings: tuple[Setting, ...]

    @property
    def columns(self) -> list[Column]:
        """The columns of all tables, each once."""
        return list(dict.fromkeys(column for table in self.experiment.tables.values() for column in table.columns))

    def check_files(self) -> None:
        """Raise ConfigurationError for weights, or files for the evaluation, that do not exist."""
        for setting in self.settings:
            check_files(setting.options, self.experiment.evaluate or {}, f"{self.name}, {setting.name}")

    def select(self, names: Sequence[str]) -> list[int]:
        """Settings by name, or by GROUP/NAME."""
        found: list[int] = []
        for name in names:
            numbers = [
                n for n, s in enumerate(self.settings) if slug(name) in (slug(s.name), slug(f"{s.group}/{s.name}"))
            ]
            if not numbers:
                listed = ", ".join(dict.fromkeys(repr(setting.name) for setting in self.settings))
                raise ConfigurationError(f"{self.name} has no row {name!r}; rows: {listed}")
            found += numbers
        return list(dict.fromkeys(found))

    def runs(self, numbers: Sequence[int], num_samples: int, output: Path) -> list[Run]:
        """The runs of some settings, and of those that they need, with every seed.

        The folder of a run is named by its identity, so that experiments share runs. A run of one ``predict`` starts with the
        samples that its setting has already, more or fewer.
        """
        wanted = set(numbers)
        for number in reversed(range(len(self.settings))):  # a needed setting stands above
            if number in wanted and (needs := self.settings[number].needs) is not None:
                wanted.add(needs)
        return [self._run(n, seed, num_samples, output) for n in sorted(wanted) for seed in self.experiment.seeds]

    def _run(self, number: int, seed: int, num_samples: int, output: Path) -> Run:
        setting = self.settings[number]
        needed = None if setting.needs is None else self._run(setting.needs, seed, num_samples, output).folder
        stem = sha256(f"{setting.digest} {seed}".encode())[:16]
        folder = output / "runs" / (f"{stem}-{num_samples}" if num_samples else stem)
        evaluate = self._evaluation(num_samples)
        if evaluate:
            files = [word.removeprefix("classifier:") for word in evaluate]
            hashes = [file_hash(path) for path in files if Path(path).is_file()]
            folder = Path(f"{folder}-{sha256(json.dumps([evaluate, hashes]).encode())[:8]}")
        argvs = [tuple(command.argv(seed, num_samples, folder, needed)) for command in setting.commands]
        argvs += [("evaluate", str(folder), *evaluate)] if evaluate else []
        alone = num_samples and not self.experiment.stages
        same = sorted(path for path in folder.parent.glob(f"{stem}-*") if path != folder) if alone else []
        return Run(number, seed, tuple(argvs), folder, needed, tuple(same), num_samples)

    def _evaluation(self, num_samples: int) -> list[str]:
        """Arguments of ``evaluate``: for runs with all samples, and where the ranking needs it."""
        options, halving, total = self.experiment.evaluate, self.experiment.halving, self.experiment.num_samples
        if options is None:
            return []
        ranked = halving and METRICS.get(halving.rank_by(num_samples, total))
        needed = num_samples == total or (ranked and ranked.measured_by == "SampleQuality")
        return evaluate_argv(options) if needed else []


def _for_stage(said: Any, stage: str, stages: Mapping[str, Stage]) -> Any:
    """What configs or set say for one stage: the same for all, unless the keys are names of stages."""
    by_stage = isinstance(said, Mapping) and said and said.keys() <= stages.keys()
    return said.get(stage, {}) if by_stage else said


def _grid(axes: Mapping[str, Axis]) -> Iterator[tuple[dict[str, str], Row]]:
    """Labels and row of every point of the axes."""
    points = []
    for axis in axes.values():
        files = [[value] if isinstance(value, str) else value for value in axis.configs]
        of_files = [Row("+".join(Path(file).name for file in each), each) for each in files]
        points.append([Row(label_of(value), set={axis.key: value}) for value in axis.values] + of_files)
    for point in itertools.product(*points) if points else ():
        labels = {name: row.name for name, row in zip(axes, point, strict=True)}
        configs = [config for row in point for config in row.configs]
        values = {key: value for row in point for key, value in row.set.items()}
        yield labels, Row(", ".join(f"{name}={label}" for name, label in labels.items()), configs, values)


def _commands(experiment: Experiment, group: object, row: Row, where: str) -> tuple[Command, ...]:
    """The commands of a setting."""
    stages, commands = experiment.stages or {"": Stage()}, []
    known = ["{seed}", "{folder}", *(["{needed}"] if row.needs else [])]
    for name, stage in stages.items():
        own = [_for_stage(said, name, stages) for said in (group, row.configs)]
        files = tuple(config for configs in (experiment.configs, stage.configs, *own) for config in configs)
        command = row.commands.get(name, stage.command)
        for config in files:
            find_configuration(config, command, said_by=where)
        values = ({**experiment.set, **stage.set}, _for_stage(row.set, name, stages))
        texts = [value for layer in values for value in layer.values() if isinstance(value, str)]
        if unknown := [place for text in texts for place in PLACES.findall(text) if place not in known]:
            raise ConfigurationError(f"{where}: unknown {unknown[0]} in a value; known: {', '.join(known)}")
        commands.append(Command(name, command, files, values))
    return tuple(commands)


def make_plan(path: Path) -> Plan:
    """Read an experiment file, resolve and check every setting, whether its weights are here or not.

    Raises:
        ConfigurationError: whatever would end a run later: keys, values, metrics that nothing measures.
    """
    where, experiment = str(path), read_experiment(path)
    if experiment.evaluate is not None:
        check_evaluation(experiment.evaluate, where)
    first = next(iter(experiment.axes), "name")
    named = [*(({first: row.name}, row) for row in experiment.rows), *_grid(experiment.axes)]
    settings: list[Setting] = []
    numbers: dict[tuple[str, str], int] = {}
    resolver = Resolver()
    with subclasses_listed_once(), parts_parsed_once(), without_network():
        for (group, configs), (labels, row) in itertools.product((experiment.groups or {"": []}).items(), named):
            if row.groups is not None and group not in row.groups:
                continue
            said, key = f"{where}, {row.name}", (slug(group), slug(row.name))
            if key in numbers:
                raise ConfigurationError(f"{where}: two settings have the same name, {row.name}")
            needs = None if row.needs is None else numbers.get((key[0], slug(row.needs)))
            if row.needs is not None and needs is None:
                raise ConfigurationError(f"{said}: needs {row.needs!r}, which is not a row above")
            commands = _commands(experiment, configs, row, said)
            options = tuple(resolver.resolve(command, said) for command in commands)
            digest = digest_of(commands, options, None if needs is None else settings[needs].digest)
            numbers[key] = len(settings)
            settings.append(Setting(group, labels, row.name, commands, options, digest, needs))
    plan = Plan(path.stem, experiment, tuple(settings))
    _check_measured(plan, where)
    return plan


def _check_measured(plan: Plan, where: str) -> None:
    """Raise ConfigurationError for columns that no setting has, or that not all have and the ranking needs."""
    ranked = plan.experiment.halving.metrics if plan.experiment.halving else []
    for column in plan.columns:
        reasons = [_unmeasured(s.options[-1], column, plan.experiment.evaluate is not None) for s in plan.settings]
        if all(reasons) or (column.key in ranked and any(reasons)):
            reason, setting = next((r, s) for r, s in zip(reasons, plan.settings, strict=True) if r)
            raise ConfigurationError(f"{where}: {column.key} would not be measured with {setting.name}: {reason}")


def _unmeasured(options: Namespace, column: Column, evaluated: bool) -> str | None:
    """Why a run has no such value; None where it has, or where that is not known before."""
    if column.file is not None or column.key not in METRICS:
        return None
    callback = METRICS[column.key].measured_by
    if evaluated and callback == "SampleQuality":
        return None
    if not any(c.class_path.rpartition(".")[2] == callback for c in options.trainer.callbacks or []):
        also = ", or evaluate to the experiment" if callback == "SampleQuality" else ""
        return f"add calib_guidance.callbacks.{callback} to trainer.callbacks{also}"
    if column.key == "integral_ece" and options.model.init_args.get("guidance") is None:
        return "it is the error of a guiding classifier, and nothing guides"
    return None
