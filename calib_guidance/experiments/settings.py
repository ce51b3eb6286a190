"""The settings of an experiment and their runs."""

from __future__ import annotations

import hashlib
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
    file_hash,
    words_of,
)
from calib_guidance.experiments.runner import Run
from calib_guidance.experiments.schema import Column, Experiment, Row, Stage, read_experiment


def slug(text: str) -> str:
    """A name as that of a folder: lower case, without spaces."""
    return re.sub(r"[^\w.=+]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Setting:
    """One setting of an experiment.

    Attributes:
        group: it is in; empty without groups.
        labels: of the setting: its row's name, or the label of its value by axis.
        name: ``γ=0.3, scale=2``, or that of the row.
        commands: of its runs, one after the other.
        options: resolved configuration of each command.
        digest: hash of all that its results depend on, but seed and number of samples.
        needs: index of the setting that must be done before it.
    """

    group: str
    labels: Mapping[str, str]
    name: str
    commands: tuple[Command, ...]
    options: tuple[Namespace, ...]
    digest: str
    needs: int | None = None

    def unmeasured(self, column: Column, evaluated: bool) -> str | None:
        """Why a run of the setting has no such value; None where it has, or where that is not known before."""
        if column.file is not None or column.key not in METRICS:
            return None
        callback = METRICS[column.key].measured_by
        if evaluated and callback == "SampleQuality":
            return None
        options = self.options[-1]
        if not any(c.class_path.rpartition(".")[2] == callback for c in options.trainer.callbacks or []):
            also = ", or evaluate to the experiment" if callback == "SampleQuality" else ""
            return f"add calib_guidance.callbacks.{callback} to trainer.callbacks{also}"
        if column.key == "integral_ece" and options.model.init_args.get("guidance") is None:
            return "it is the error of a guiding classifier, and nothing guides"
        return None


def label_of(value: object) -> str:
    """A value of an axis as text; a list of configuration files by their names."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Plan:
    """An experiment with its settings resolved.

    Attributes:
        name: of the file.
        experiment: what the file says.
        settings: rows, then the grid, in each group.
    """

    name: str
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
        """Settings by name, or by GROUP/NAME.

        Raises:
            ConfigurationError: no setting has such a name.
        """
        known = {f"{slug(s.group)}/{slug(s.name)}": number for number, s in enumerate(self.settings)}
        found: list[int] = []
        for name in names:
            group, slash, rest = name.rpartition("/")
            ends = f"{slug(group)}/{slug(rest)}" if slash else f"/{slug(name)}"
            numbers = [number for key, number in known.items() if key == ends or (not slash and key.endswith(ends))]
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
        stem = hashlib.sha256(f"{setting.digest} {seed}".encode()).hexdigest()[:16]
        folder = output / "runs" / (f"{stem}-{num_samples}" if num_samples else stem)
        options = self._evaluation(num_samples)
        if options:
            named = [word.removeprefix("classifier:") for word in options]
            files = [file_hash(path) for path in named if Path(path).is_file()]
            of = hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()[:8]
            folder = folder.with_name(f"{folder.name}-{of}")
        argvs = [tuple(command.argv(seed, num_samples, folder, needed)) for command in setting.commands]
        argvs += [("evaluate", str(folder), *options)] if options else []
        alone = num_samples and not self.experiment.stages
        same = [p for p in sorted(folder.parent.glob(f"{stem}-*")) if p != folder] if alone else []
        return Run(number, seed, tuple(argvs), folder, needed, tuple(same), num_samples)

    def _evaluation(self, num_samples: int) -> list[str]:
        """Arguments of ``evaluate``: for runs with all samples, and where the ranking needs it."""
        halving, options, total = self.experiment.halving, self.experiment.evaluate, self.experiment.num_samples
        ranked = None
        if halving is not None and num_samples in halving.rungs(total):
            ranked = METRICS.get(halving.rank_by(num_samples, total))
        needed = num_samples == total or (ranked is not None and ranked.measured_by == "SampleQuality")
        return words_of(options) if options and needed else []


def _for_stage(said: Any, stage: str, stages: Mapping[str, Stage]) -> Any:
    """What configs or set say for one stage: the same for all, unless the keys are names of stages."""
    by_stage = isinstance(said, Mapping) and said and said.keys() <= stages.keys()
    return said.get(stage) or type(next(iter(said.values())))() if by_stage else said


def _grid(experiment: Experiment, where: str) -> Iterator[tuple[dict[str, str], Row]]:
    """Labels and row of every point of the axes."""
    points = []
    for name, axis in experiment.axes.items():
        files = [[value] if isinstance(value, str) else value for value in axis.configs]
        labels = [label_of(v) for v in axis.values] + ["+".join(Path(f).name for f in each) for each in files]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ConfigurationError(f"{where}: two settings have the same name, {name}={twice[0]}")
        rows = [Row("", set={axis.key: value}) for value in axis.values] + [Row("", configs=each) for each in files]
        points.append([(name, label, row) for label, row in zip(labels, rows, strict=True)])
    for point in itertools.product(*points) if points else ():
        labels = {name: label for name, label, _ in point}
        configs = [config for *_, row in point for config in row.configs]
        values = {key: value for *_, row in point for key, value in row.set.items()}
        yield labels, Row(", ".join(f"{n}={label}" for n, label in labels.items()), configs, values)


def _commands(experiment: Experiment, group: object, row: Row, where: str) -> tuple[Command, ...]:
    """The commands of a setting."""
    stages, commands = experiment.stages or {"": Stage()}, []
    for name, stage in stages.items():
        said = [
            experiment.configs,
            stage.configs,
            _for_stage(group, name, stages),
            _for_stage(row.configs, name, stages),
        ]
        command = row.commands.get(name, stage.command)
        files = [config for configs in said for config in configs]
        for config in files:
            find_configuration(config, command, said_by=where)
        values = ({**experiment.set, **stage.set}, _for_stage(row.set, name, stages))
        known = ["{seed}", "{folder}", *(["{needed}"] if row.needs else [])]
        texts = [value for layer in values for value in layer.values() if isinstance(value, str)]
        if unknown := [place for text in texts for place in PLACES.findall(text) if place not in known]:
            raise ConfigurationError(f"{where}: unknown {unknown[0]} in a value; known: {', '.join(known)}")
        commands.append(Command(name, command, tuple(files), values))
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
    named = [({first: row.name}, row) for row in experiment.rows] + list(_grid(experiment, where))
    settings: list[Setting] = []
    numbers: dict[tuple[str, str], int] = {}
    resolver = Resolver()
    with subclasses_listed_once(), without_network():
        for group, group_configs in (experiment.groups or {"": []}).items():
            for labels, row in named:
                if row.groups is not None and group not in row.groups:
                    continue
                said = f"{where}, {row.name}"
                key = (slug(group), slug(row.name))
                if key in numbers:
                    raise ConfigurationError(f"{where}: two settings have the same name, {row.name!r}")
                needs = None if row.needs is None else numbers.get((key[0], slug(row.needs)))
                if row.needs is not None and needs is None:
                    raise ConfigurationError(f"{said}: needs {row.needs!r}, which is not a row above")
                commands = _commands(experiment, group_configs, row, said)
                options = tuple(resolver.resolve(command, said) for command in commands)
                digest = digest_of(commands, options, None if needs is None else settings[needs].digest)
                numbers[key] = len(settings)
                settings.append(Setting(group, labels, row.name, commands, options, digest, needs))
    plan = Plan(path.stem, experiment, tuple(settings))
    _check_measured(plan, where)
    return plan


def _check_measured(plan: Plan, where: str) -> None:
    """Raise ConfigurationError for columns that no setting has, or that not all have and the ranking needs."""
    ranked = plan.experiment.halving.metrics() if plan.experiment.halving else []
    for column in plan.columns:
        reasons = [setting.unmeasured(column, plan.experiment.evaluate is not None) for setting in plan.settings]
        if all(reasons) or (column.key in ranked and any(reasons)):
            reason, setting = next((r, s) for r, s in zip(reasons, plan.settings, strict=True) if r)
            raise ConfigurationError(f"{where}: {column.key} would not be measured with {setting.name}: {reason}")
