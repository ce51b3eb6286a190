"""The format of experiment files, and reading them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calib_guidance.backend.text import parse_yaml, read_yaml
from calib_guidance.cli.configs import with_bases
from calib_guidance.errors import ConfigurationError, closest
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.experiments.objectives import parse_objective

# Keys of the configuration that an experiment sets from another place of its file or of the command line.
_OWN_KEYS = {"data.num_samples": "num_samples", "data.seed": "seeds", "trainer.default_root_dir": "--output"}
Command = Literal["fit", "validate", "test", "predict"]


@dataclass(frozen=True)
class Column:
    """One column of a table: a value that runs write into a JSON file."""

    key: str  # with dots into mappings and lists, e.g. ``ece.by_level.3``
    title: str | None = None  # None for that of the metric in METRICS; an arrow ↑ says that higher is better
    file: str | None = None  # in the run's folder; None for ``metrics.json`` of ``evaluate`` and the one ``predict``
    digits: int | None = None  # after the decimal point; None for the format of the metric, or 3

    @property
    def sign(self) -> int:
        """-1 where higher is better, else 1."""
        return -1 if "↑" in (self.title or "") else 1

    def text(self, value: float) -> str:
        """A value as the table shows it."""
        if self.digits is None and self.key in METRICS:
            return METRICS[self.key].text(value)
        return f"{value:.{3 if self.digits is None else self.digits}f}"


@dataclass(frozen=True)
class Table:
    """A table of results."""

    columns: list[str | Column]  # keys of METRICS, or columns of any file
    title: str = "setting"  # above the names of the rows


@dataclass(frozen=True)
class Stage:
    """One command of a run."""

    command: Command = "predict"
    configs: list[str] = field(default_factory=list)  # by path, or by name as for ``--config``; later ones override
    set: dict[str, Any] = field(default_factory=dict)  # values of dotted configuration keys, which override files


@dataclass(frozen=True)
class Row:
    """A named setting. ``configs`` and ``set`` are for all stages, or mappings of stages to what is for each."""

    name: str
    configs: list[str] | dict[str, list[str]] = field(default_factory=list)  # after those of the stage and of the group
    set: dict[str, Any] = field(default_factory=dict)
    groups: list[str] | None = None  # that the row is in; None for all
    needs: str | None = None  # row above that must be done first; ``{needed}`` in values is its run folder
    commands: dict[str, Command] = field(default_factory=dict)  # by stage, in place of the stage's own


@dataclass(frozen=True)
class Axis:
    """What a grid varies: the values of a key; or configuration files, one or several for each point."""

    key: str | None = None
    values: list[Any] = field(default_factory=list)
    configs: list[str | list[str]] = field(default_factory=list)
    title: str | None = None  # in tables and plots; None for the axis's name


@dataclass(frozen=True)
class Halving:
    """Successive halving: which settings get more samples."""

    by: str | list[str]  # metric that settings are ranked by, or one for each rung; the last one counts from there on
    samples: int  # of the first rung; the last rung has the experiment's ``num_samples``
    factor: int = 3  # one in so many settings is promoted, to so many times the samples

    def rungs(self, num_samples: int) -> list[int]:
        """Samples of each rung, ascending to ``num_samples``."""
        rungs = [self.samples]
        while rungs[-1] * self.factor < num_samples:
            rungs.append(rungs[-1] * self.factor)
        return [*rungs, num_samples]

    @property
    def metrics(self) -> list[str]:
        """The metrics of ``by``, as a list."""
        return [self.by] if isinstance(self.by, str) else self.by

    def rank_by(self, samples: int, num_samples: int) -> str:
        """The metric that settings are ranked by at the rung of so many samples."""
        return self.metrics[min(self.rungs(num_samples).index(samples), len(self.metrics) - 1)]


@dataclass(frozen=True)
class Parameter:
    """What ``tune`` varies of a method: a number between bounds, or one of several values."""

    key: str
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False  # equally likely factors in place of differences
    values: list[Any] = field(default_factory=list)

    def at(self, u: float) -> Any:
        """The value at ``u`` in [0, 1], to three digits."""
        if self.values:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        value = self.low * (self.high / self.low) ** u if self.log else self.low + (self.high - self.low) * u
        return float(f"{value:.3g}")


@dataclass(frozen=True)
class Tune:
    """What ``calib-guidance tune`` searches: the same number of candidates of every method, which are the groups."""

    candidates: int  # of each method
    confirm: list[int]  # seeds that the search never sees, for the best of each method
    parameters: dict[str, Parameter] = field(default_factory=dict)  # of every method
    own: dict[str, dict[str, Parameter]] = field(default_factory=dict)  # more of some methods


@dataclass(frozen=True)
class Experiment:
    """An experiment file. Its settings are the rows, then the grid of the axes, in each group; docs/experiments.md."""

    seeds: list[int]  # of every setting: ``data.seed`` of sampling, ``seed_everything`` of training
    configs: list[str] = field(default_factory=list)  # of every stage
    set: dict[str, Any] = field(default_factory=dict)  # of every stage; with ``{seed}`` and ``{folder}`` of the run
    stages: dict[str, Stage] = field(default_factory=dict)  # in order, each in its own folder; none: one predict
    num_samples: int = 0  # of each ``predict``; 0 for what its configuration says
    rows: list[Row] = field(default_factory=list)
    axes: dict[str, Axis] = field(default_factory=dict)
    groups: dict[str, list[str] | dict[str, list[str]]] = field(default_factory=dict)  # name to configuration files
    columns: list[str | Column] = field(default_factory=list)  # of the one table, ``table.md``
    title: str = "setting"  # of the one table
    tables: dict[str, Table] = field(default_factory=dict)  # by mark: ``MARK.md``, ``<!-- MARK -->`` in Markdown
    evaluate: dict[str, Any] | None = None  # options of ``calib-guidance evaluate``, which then measures every run
    halving: Halving | None = None
    tune: Tune | None = None  # in place of rows and axes, for ``calib-guidance tune``


_NAMES = {str: "text", int: "an integer", list: "a list", type(None): "null"}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """A value of a type, from YAML's types; a mapping becomes a dataclass."""
    expected = []
    for each in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        plain, args = typing.get_origin(each) or each, typing.get_args(each)
        if plain is Any or (plain is Literal and value in args):
            return value
        if dataclasses.is_dataclass(plain) and isinstance(value, dict):
            return _parse_fields(plain, value, where)
        if type(value) is plain:
            if plain is list:
                return [_parse(args[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
            if plain is dict:
                return {str(name): _parse(args[1], item, f"{where}[{name}]") for name, item in value.items()}
            return value
        expected.append(f"one of {', '.join(args)}" if plain is Literal else _NAMES.get(plain, "a mapping"))
    raise ConfigurationError(f"{where}: expected {' or '.join(expected)}, got {value!r}")


def _parse_fields(kind: type, content: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            unknown = f"unknown key {key!r}{closest(str(key), hints)}"
            raise ConfigurationError(f"{where}: {unknown}; allowed: {', '.join(hints)}")
    for each in dataclasses.fields(kind):
        if each.default is each.default_factory is dataclasses.MISSING and each.name not in content:
            raise ConfigurationError(f"{where}: missing key {each.name!r}")
    return kind(**{key: _parse(hints[key], value, f"{where}, {key}") for key, value in content.items()})


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file; the columns of its ``tables`` have titles."""
    where = str(path)
    parts = [parse_yaml(part) if "\n" in part else read_yaml(part) for part in with_bases(path, "experiment")]
    if len(parts) > 1 and all(isinstance(part, dict) for part in parts):  # keys override those of the base
        parts = [{key: value for part in parts for key, value in part.items()}]
    experiment = _parse(Experiment, parts[-1], where)
    if bool(experiment.columns) == bool(experiment.tables):
        raise ConfigurationError(f"{where}: expected columns (of one table), or tables (each with its columns)")
    tables = experiment.tables or {"table": Table(experiment.columns, experiment.title)}
    stages = [name for name, stage in experiment.stages.items() if stage.command == "predict"]
    for mark, table in tables.items():
        columns = [_complete(column, stages if experiment.stages else None, where) for column in table.columns]
        tables[mark] = dataclasses.replace(table, columns=columns)
    experiment = dataclasses.replace(experiment, tables=tables)
    _check(experiment, where)
    return experiment


def _complete(column: str | Column, stages: Sequence[str] | None, where: str) -> Column:
    """A column with its title and, where there are stages, its file: ``metrics.json`` of the one that predicts."""
    column = Column(column) if isinstance(column, str) else column
    if column.file is None and stages is not None:
        if len(stages) != 1:
            one = f"one of {', '.join(f'{stage}/metrics.json' for stage in stages)}" if stages else "no stage predicts"
            raise ConfigurationError(f"{where}: column {column.key} needs file, which a run writes: {one}")
        column = dataclasses.replace(column, file=f"{stages[0]}/metrics.json")
    if column.title is not None:
        return column
    if column.key in METRICS:
        return dataclasses.replace(column, title=METRICS[column.key].title)
    allowed = f"metrics: {', '.join(METRICS)}. Other columns need a title"
    raise ConfigurationError(f"{where}: there is no metric {column.key!r}{closest(column.key, METRICS)}; {allowed}")


def _check_tune(experiment: Experiment, where: str) -> None:
    """Raise ConfigurationError for a search that cannot be made."""
    tune, where = experiment.tune, f"{where}, tune"
    if experiment.rows or experiment.axes or experiment.halving is None or not experiment.groups:
        raise ConfigurationError(f"{where}: expected groups (the methods) and halving, and neither rows nor axes")
    if tune.candidates < 2:
        raise ConfigurationError(f"{where}: candidates must be at least 2, got {tune.candidates}")
    if not tune.confirm or {*tune.confirm} & {*experiment.seeds}:
        raise ConfigurationError(f"{where}: confirm must be seeds that the search does not see, got {tune.confirm}")
    if unknown := tune.own.keys() - experiment.groups.keys():
        raise ConfigurationError(f"{where}, own: no group {min(unknown)!r}; groups: {', '.join(experiment.groups)}")
    for method in experiment.groups:
        found = tune.parameters | tune.own.get(method, {})
        if not found:
            raise ConfigurationError(f"{where}: {method} has nothing to vary: add parameters")
        for name, each in found.items():
            bounds = None not in (each.low, each.high) and each.low < each.high and (each.low > 0 or not each.log)
            if bounds == bool(each.values):
                raise ConfigurationError(
                    f"{where}, {name}: expected values, or low below high (above 0 with log), got low {each.low}, "
                    f"high {each.high} and values {each.values}"
                )


def _check(experiment: Experiment, where: str) -> None:
    """Raise ConfigurationError for what types do not say."""
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigurationError(f"{where}: seeds must be different integers, at least one, got {experiment.seeds}")
    if experiment.tune is not None:
        _check_tune(experiment, where)
    elif not experiment.rows and not experiment.axes:
        raise ConfigurationError(f"{where}: expected rows, axes or both: there is nothing to run")
    if experiment.num_samples < 0:
        raise ConfigurationError(f"{where}: num_samples must be at least 1, got {experiment.num_samples}")
    for name, axis in experiment.axes.items():
        if bool(axis.key) != bool(axis.values) or bool(axis.key) == bool(axis.configs):
            raise ConfigurationError(
                f"{where}, axes[{name}]: expected key and values, or configs, at least one of them"
            )
    keys = [key for settings in (experiment, *experiment.stages.values(), *experiment.rows) for key in settings.set]
    for key in [*keys, *(axis.key for axis in experiment.axes.values() if axis.key)]:
        if own := _OWN_KEYS.get(key.replace("init_args.", "")):
            raise ConfigurationError(f"{where}: an experiment sets {key} itself: use {own}")
    for group in [group for row in experiment.rows for group in row.groups or []]:
        if group not in experiment.groups:
            raise ConfigurationError(f"{where}: no group {group!r}; groups: {', '.join(experiment.groups)}")
    samples_once = experiment.num_samples and not experiment.stages
    if not samples_once and (experiment.evaluate is not None or experiment.halving is not None):
        raise ConfigurationError(f"{where}: evaluate and halving need num_samples, and no stages but one predict")
    if (halving := experiment.halving) is None:
        return
    where = f"{where}, halving"
    measured = [column.key for table in experiment.tables.values() for column in table.columns]
    for text in halving.metrics or [""]:
        if unknown := [key for key in parse_objective(text, where).keys if key not in measured]:
            raise ConfigurationError(f"{where}: by must name columns ({', '.join(measured)}), got {unknown[0]!r}")
    if not 0 < halving.samples < experiment.num_samples:
        allowed = f"from 1 to {experiment.num_samples - 1}"
        raise ConfigurationError(f"{where}: samples must be {allowed}, got {halving.samples}")
    if halving.factor < 2:
        raise ConfigurationError(f"{where}: factor must be at least 2, got {halving.factor}")
