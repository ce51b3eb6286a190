"""The format of experiment files: what they may say, and reading them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from calib_guidance.cli.lightning import shorten
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS

Command = Literal["fit", "validate", "test", "predict"]
# Keys of the configuration that an experiment sets from another place of its file or of the command line.
OWN_KEYS = {"data.num_samples": "num_samples", "data.seed": "seeds", "trainer.default_root_dir": "--output"}


@dataclass(frozen=True)
class Column:
    """One column of a table: a value that runs write into a JSON file."""

    key: str  # with dots into mappings and lists, e.g. ``ece.by_level.3``
    title: str | None = None  # None for that of the metric in METRICS; an arrow ↑ says that higher is better
    file: str | None = (
        None  # in the run's folder; None for ``metrics.json``, of ``evaluate`` before that of ``predict``
    )
    digits: int | None = None  # after the decimal point; None for the format of the metric, or 3

    @property
    def sign(self) -> int:
        """-1 where higher is better, else 1."""
        return -1 if "↑" in (self.title or "") else 1

    def text(self, value: float) -> str:
        """A value as the table shows it."""
        known = METRICS[self.key].format if self.key in METRICS else "{:.3f}"
        return known.format(value) if self.digits is None else f"{value:.{self.digits}f}"


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
    """What a grid varies: the values of a key, or configuration files."""

    key: str | None = None
    values: list[Any] = field(default_factory=list)
    configs: list[str | list[str]] = field(
        default_factory=list
    )  # in place of key and values: a file, or several, per point
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

    def metrics(self) -> list[str]:
        """The metrics of ``by``, as a list."""
        return [self.by] if isinstance(self.by, str) else self.by

    def rank_by(self, samples: int, num_samples: int) -> str:
        """The metric that settings are ranked by at the rung of so many samples."""
        return self.metrics()[min(self.rungs(num_samples).index(samples), len(self.metrics()) - 1)]


@dataclass(frozen=True)
class Experiment:
    """An experiment file. Its settings are the rows, then the grid of the axes, in each group; docs/experiments.md."""

    seeds: list[int]  # of every setting: ``data.seed`` of sampling, ``seed_everything`` of training
    configs: list[str] = field(default_factory=list)  # of every stage
    set: dict[str, Any] = field(
        default_factory=dict
    )  # of every stage; ``{seed}`` and ``{folder}`` are those of the run
    stages: dict[str, Stage] = field(
        default_factory=dict
    )  # commands in order, each in its own folder; none: one predict
    num_samples: int = 0  # of each ``predict``; 0 for what its configuration says
    rows: list[Row] = field(default_factory=list)
    axes: dict[str, Axis] = field(default_factory=dict)
    groups: dict[str, list[str] | dict[str, list[str]]] = field(default_factory=dict)  # name to configuration files
    columns: list[str | Column] = field(default_factory=list)  # of the one table, ``table.md``
    title: str = "setting"  # of the one table
    tables: dict[str, Table] = field(
        default_factory=dict
    )  # several: ``MARK.md``, ``<!-- MARK -->`` in the file of --into
    evaluate: dict[str, Any] | None = None  # options of ``calib-guidance evaluate``, which then measures every run
    halving: Halving | None = None


_NESTED: dict[str, tuple[type | None, type]] = {
    "rows": (list, Row),
    "axes": (dict, Axis),
    "stages": (dict, Stage),
    "tables": (dict, Table),
    "columns": (list, Column),
    "halving": (None, Halving),
}


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _parse(kind: type, content: object, where: str) -> Any:
    """An instance of a dataclass from YAML's types."""
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where} must be a mapping, got {content!r}")
    known = {f.name: f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind)}
    free = {f.name: "Any" in f.type for f in dataclasses.fields(kind)}  # jsonargparse would build classes named in them
    if unknown := [key for key in content if key not in known]:
        hint = _closest(str(unknown[0]), list(known))
        raise ConfigurationError(f"{where}: unknown key {unknown[0]!r}{hint}; allowed: {', '.join(known)}")
    if missing := [key for key, needed in known.items() if needed and key not in content]:
        raise ConfigurationError(f"{where}: missing key {missing[0]!r}")
    nested = {key: _nested(key, value, where) for key, value in content.items() if key in _NESTED and value is not None}
    nested |= {
        key: content[key] for key, any_type in free.items() if any_type and isinstance(content.get(key), dict | list)
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(nested))
    try:
        parsed = parser.parse_object({key: value for key, value in content.items() if key not in nested})
    except ArgumentError as error:
        message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(shorten(str(error)).split()))
        union = re.search(r'Parser key "(\w+)": .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)', message)
        message = f"{union[1]}: Expected one of {union[2]}. Got value: {union[3]}" if union else message
        raise ConfigurationError(f"{where}: {message}") from error
    return kind(**parsed.as_dict() | nested)


def _nested(key: str, content: Any, where: str) -> Any:
    """The parts of a file that are dataclasses of their own, one by one, so that messages say which."""
    container, kind = _NESTED[key]
    if container is None:
        return _parse(kind, content, f"{where}, {key}")
    if not isinstance(content, container):
        expected = "list" if container is list else "mapping"
        raise ConfigurationError(f"{where}: {key} must be a {expected}, got {content!r}")
    parsed = {}
    for name, item in enumerate(content) if container is list else content.items():
        plain = kind is Column and isinstance(item, str)
        parsed[name] = item if plain else _parse(kind, item, f"{where}, {key}[{name}]")
    return list(parsed.values()) if container is list else parsed


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file; the columns of its tables have titles.

    Raises:
        ConfigurationError: not YAML, unknown or missing keys, values of another type or out of range, metrics
            that do not exist.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    experiment = _parse(Experiment, content, str(path))
    if bool(experiment.columns) == bool(experiment.tables):
        raise ConfigurationError(f"{path}: expected columns (of one table), or tables (each with its columns)")
    tables = experiment.tables or {"table": Table(experiment.columns, experiment.title)}
    complete = {mark: Table([_complete(c, str(path)) for c in t.columns], t.title) for mark, t in tables.items()}
    experiment = dataclasses.replace(experiment, tables=complete)
    _check(experiment, str(path))
    return experiment


def _check(experiment: Experiment, where: str) -> None:
    """Raise ConfigurationError for what types do not say."""
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigurationError(f"{where}: seeds must be different integers, at least one, got {experiment.seeds}")
    if not experiment.rows and not experiment.axes:
        raise ConfigurationError(f"{where}: expected rows, axes or both: there is nothing to run")
    if experiment.num_samples < 0:
        raise ConfigurationError(f"{where}: num_samples must be at least 1, got {experiment.num_samples}")
    for name, axis in experiment.axes.items():
        if bool(axis.key and axis.values) == bool(axis.configs) or bool(axis.key) == bool(axis.configs):
            raise ConfigurationError(
                f"{where}, axes[{name}]: expected key and values, or configs, at least one of them"
            )
    keys = [key for settings in (experiment, *experiment.stages.values(), *experiment.rows) for key in settings.set]
    for key in [*keys, *(axis.key for axis in experiment.axes.values() if axis.key)]:
        if own := OWN_KEYS.get(key.replace("init_args.", "")):
            raise ConfigurationError(f"{where}: an experiment sets {key} itself: use {own}")
    titles = [name for row in experiment.rows for name in row.groups or [] if name not in experiment.groups]
    if titles:
        raise ConfigurationError(f"{where}: no group {titles[0]!r}; groups: {', '.join(experiment.groups)}")
    measured = [column.key for table in experiment.tables.values() for column in table.columns]
    samples_once = experiment.num_samples and not experiment.stages
    if not samples_once and (experiment.evaluate is not None or experiment.halving is not None):
        raise ConfigurationError(f"{where}: evaluate and halving need num_samples, and no stages but one predict")
    if halving := experiment.halving:
        if not halving.by or (missing := [key for key in halving.metrics() if key not in measured]):
            named = missing[0] if halving.by else halving.by
            raise ConfigurationError(f"{where}, halving: by must name columns ({', '.join(measured)}), got {named!r}")
        if not 0 < halving.samples < experiment.num_samples:
            allowed = f"from 1 to {experiment.num_samples - 1}"
            raise ConfigurationError(f"{where}, halving: samples must be {allowed}, got {halving.samples}")
        if halving.factor < 2:
            raise ConfigurationError(f"{where}, halving: factor must be at least 2, got {halving.factor}")


def _complete(column: str | Column, where: str) -> Column:
    """A column with its title."""
    column = Column(column) if isinstance(column, str) else column
    if column.key in METRICS:
        return dataclasses.replace(column, title=column.title or METRICS[column.key].title)
    if column.title is None:
        hint = _closest(column.key, list(METRICS))
        allowed = f"metrics: {', '.join(METRICS)}. Other columns need a title"
        raise ConfigurationError(f"{where}: there is no metric {column.key!r}{hint}; {allowed}")
    return column
