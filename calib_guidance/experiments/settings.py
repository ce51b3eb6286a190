"""The settings of an experiment: their commands, resolved and checked before the first run, and their runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from calib_guidance.backend.text import dump_yaml
from calib_guidance.cli import measure_options
from calib_guidance.cli.configs import expand_bases, find_configuration
from calib_guidance.cli.doctor.files import missing_files
from calib_guidance.cli.lightning import innermost, run_lightning, subclasses_listed_once
from calib_guidance.cli.parse_once import parts_parsed_once
from calib_guidance.cli.parsed import ModulesMadeOnce, ParsedCLI, all_options, without_network
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.experiments.objectives import parse_objective
from calib_guidance.experiments.runner import Run
from calib_guidance.experiments.schema import Axis, Column, Experiment, Row, Stage, read_experiment
from calib_guidance.runs.identity import file_hash, settings
from calib_guidance.runs.integrity import sha256

_QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
_PLACES = re.compile(r"\{\w+\}")  # in values, filled in for each run


def slug(text: str) -> str:
    """A name as that of a folder: lower case, without spaces."""
    return re.sub(r"[^\w.=+]+", "-", text.lower()).strip("-")


def label_of(value: object) -> str:
    """A value of an axis as text."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Command:
    """One command of a setting. ``{seed}``, ``{folder}`` and ``{needed}`` in its values are filled in for each run."""

    stage: str  # the command writes into a folder of that name below that of the run
    name: str  # ``predict``, ``fit`` …
    configs: tuple[str, ...]  # files
    values: tuple[Mapping[str, Any], ...]  # of dotted configuration keys, common ones and those of the row

    @property
    def of_files(self) -> dict[str, str]:
        """Values that name files of this run or of the needed one, which do not exist before it."""
        texts = {key: value for values in self.values for key, value in values.items() if isinstance(value, str)}
        return {key: text for key, text in texts.items() if "{folder}" in text or "{needed}" in text}

    def argv(self, seed: int, num_samples: int, folder: Path | None = None, needed: Path | None = None) -> list[str]:
        """The command line of a run; without a folder that of no run, without the values that name files of runs."""
        own = {"data.seed": seed} if self.name == "predict" else {"seed_everything": seed}
        own |= {"data.num_samples": num_samples} if self.name == "predict" and num_samples else {}
        known = {"{seed}": seed, "{folder}": folder, "{needed}": needed}

        def fill(value: Any) -> Any:
            return seed if value == "{seed}" else _PLACES.sub(lambda place: str(known[place[0]]), value)

        argv = [self.name, *(word for config in self.configs for word in ("--config", config))]
        for values in ({**own, **self.values[0]}, *self.values[1:]):
            kept = {key: value for key, value in values.items() if folder is not None or key not in self.of_files}
            filled = {key: fill(value) if isinstance(value, str) else value for key, value in kept.items()}
            # Options of a part that the same values name come after it: within one file they would take its class away.
            inner = {key for key in filled if any(key.startswith(f"{other}.") for other in filled)}
            for part in (filled.keys() - inner, inner):
                argv += ["--config", dump_yaml({key: filled[key] for key in filled if key in part})] if part else []
        return [*argv, f"--trainer.default_root_dir={(folder or Path()) / self.stage}", *_QUIET]


class _Resolver:
    """Resolves and checks commands, each once; so does it make their parsers, which takes longest."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Namespace] = {}
        self._clis: dict[str, ParsedCLI] = {}
        self._made = ModulesMadeOnce()

    def resolve(self, command: Command, where: str) -> Namespace:
        """The configuration of a command, without values that name files of runs."""
        argv = tuple(command.argv(seed=0, num_samples=1))
        if argv not in self._known:
            try:
                cli = self._parse(argv)
                self._known[argv] = copy.deepcopy(cli.options)
                # Sampling is built without weights, for what the constructors refuse.
                if command.name == "predict" and (module := cli.build_on_meta(self._made)) is not None:
                    module.sampler.check(module.denoiser, module.guidance)
                    cli.build("data", cli.options.data)
            except (ValueError, RuntimeError, CheckpointError) as error:
                raise ConfigurationError(f"{where}: {innermost(error)}") from error
        return self._known[argv]

    def _parse(self, argv: Sequence[str]) -> ParsedCLI:
        files = [file for option, file in itertools.pairwise(argv) if option == "--config" and "\n" not in file]
        try:
            if (cli := self._clis.get(argv[0])) is None:
                cli = self._clis[argv[0]] = run_lightning(argv, ParsedCLI)
            else:
                cli.parse_arguments(cli.parser, expand_bases(argv))
        except ConfigurationError:
            words = (argv[0], *(word for file in files for word in ("--config", file)))
            if words != argv and words == argv[: len(words)]:
                self._parse(words)  # says so where it is another command's model that refuses the values
            raise
        if cli.trains != (argv[0] != "predict"):
            does = "is for training" if cli.trains else "is for sampling"
            raise ConfigurationError(f"{argv[0]} cannot run {', '.join(files)}: its model {does}")
        return cli


@dataclass(frozen=True)
class Setting:
    """One setting of an experiment."""

    group: str  # that it is in; empty without groups
    labels: Mapping[str, str]  # its row's name, or the label of its value by axis
    name: str  # ``γ=0.3, scale=2``, or that of the row
    commands: tuple[Command, ...]  # of its runs, one after the other
    options: tuple[Namespace, ...]  # resolved configuration of each command
    needs: int | None = None  # index of the setting that must be done before it
    needed: str | None = None  # digest of that setting

    @functools.cached_property
    def digest(self) -> str:
        """Hash of all that its results depend on, but seed and number of samples.

        A value that names a file of a run counts as its text: what is in the file is a function of the commands before it, or of
        the needed setting, whose digest is part of this one.
        """
        content = []
        for command, resolved in zip(self.commands, self.options, strict=True):
            values = {key: value for key, value in resolved.as_dict().items() if key != "config"}
            parts = {key: values.pop(key) for key in ("model", "data") if values.get(key)}
            identity = [settings(part, key, trains=command.name == "fit") for key, part in parts.items()]
            # Of files that callbacks name, which may be what they write, only weights count.
            weights = [option.value for option in all_options(resolved.trainer, "trainer") if option.is_weights]
            hashes = [file_hash(path) for path in sorted(weights) if Path(path).is_file()]
            content.append([command.name, identity, values, command.of_files, hashes])
        text = json.dumps([content, self.needed], sort_keys=True, default=str, ensure_ascii=False)
        return sha256(text.encode())


@dataclass(frozen=True)
class Plan:
    """An experiment with its settings resolved: rows, then the grid, in each group."""

    name: str  # of the file
    experiment: Experiment
    settings: tuple[Setting, ...]
    evaluation: list[str]  # arguments of ``evaluate``; none without an evaluation

    @property
    def columns(self) -> list[Column]:
        """The columns of all tables, each once."""
        return list(dict.fromkeys(column for table in self.experiment.tables.values() for column in table.columns))

    def check_files(self) -> None:
        """Raise ConfigurationError for weights, or files for the evaluation, that do not exist."""
        for setting in self.settings:
            for missing in (text for options in setting.options for text in missing_files(options)):
                raise ConfigurationError(f"{self.name}, {setting.name}: {missing}")
        for option in ("reference", "features", "eval_classifier", "clip"):
            path = Path(str((self.experiment.evaluate or {}).get(option, "")).removeprefix("classifier:"))
            if path.suffix in (".npz", ".yaml", ".yml") and not path.exists():  # not the name of a data set
                raise ConfigurationError(f"{self.name}, evaluate: {option} {path} does not exist")

    def select(self, names: Sequence[str]) -> list[int]:
        """Settings by name, or by GROUP/NAME."""
        found: list[int] = []
        known = [(slug(setting.name), slug(f"{setting.group}/{setting.name}")) for setting in self.settings]
        for name in names:
            if not (numbers := [number for number, each in enumerate(known) if slug(name) in each]):
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
        if evaluated := bool(self.evaluation) and self._evaluates(num_samples):
            files = [word.removeprefix("classifier:") for word in self.evaluation]
            hashes = [file_hash(path) for path in files if Path(path).is_file()]
            folder = Path(f"{folder}-{sha256(json.dumps([self.evaluation, hashes]).encode())[:8]}")
        argvs = [tuple(command.argv(seed, num_samples, folder, needed)) for command in setting.commands]
        argvs += [("evaluate", str(folder), *self.evaluation)] if evaluated else []
        alone = num_samples and not self.experiment.stages
        same = sorted(path for path in folder.parent.glob(f"{stem}-*") if path != folder) if alone else []
        return Run(number, seed, tuple(argvs), folder, needed, tuple(same), num_samples)

    def _evaluates(self, num_samples: int) -> bool:
        """Whether a run is evaluated: with all samples, and where the ranking needs it."""
        halving, total = self.experiment.halving, self.experiment.num_samples
        keys = parse_objective(halving.rank_by(num_samples, total), self.name).keys if halving else ()
        return num_samples == total or any(
            key in METRICS and METRICS[key].measured_by == "SampleQuality" for key in keys
        )


def _evaluation(options: Mapping[str, Any] | None, where: str) -> list[str]:
    """Arguments of ``evaluate``, none without an evaluation; ConfigurationError for what it would refuse after sampling."""
    if options is None:
        return []
    if "reference" not in options:
        raise ConfigurationError(f"{where}: evaluate compares with a reference: add reference: FILE")
    if "output" in options:
        raise ConfigurationError(f"{where}, evaluate: results are kept with each run: remove output")
    given = {f"--{option}": value for option, value in options.items() if value is not False}
    argv = [word for option, value in given.items() for word in ([option] if value is True else [option, str(value)])]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            measure_options.evaluate(["RUN", *argv])
        except SystemExit:
            raise ConfigurationError(f"{where}, evaluate: {said.getvalue().rpartition('error: ')[2].strip()}") from None
    return argv


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


def _commands(experiment: Experiment, group: object, row: Row, where: str) -> Iterator[Command]:
    """The commands of a setting."""
    stages = experiment.stages or {"": Stage()}
    known = ["{seed}", "{folder}", *(["{needed}"] if row.needs else [])]
    for name, stage in stages.items():
        own = [_for_stage(said, name, stages) for said in (group, row.configs)]
        files = tuple(config for configs in (experiment.configs, stage.configs, *own) for config in configs)
        command = row.commands.get(name, stage.command)
        for config in files:
            find_configuration(config, command, by=where)
        values = ({**experiment.set, **stage.set}, _for_stage(row.set, name, stages))
        texts = [value for layer in values for value in layer.values() if isinstance(value, str)]
        if unknown := [place for text in texts for place in _PLACES.findall(text) if place not in known]:
            raise ConfigurationError(f"{where}: unknown {unknown[0]} in a value; known: {', '.join(known)}")
        for key, value in ((key, value) for layer in values for key, value in layer.items()):
            if not isinstance(value, str) and (inside := [place for place in known if place in json.dumps(value)]):
                raise ConfigurationError(
                    f"{where}: {inside[0]} stands within the mapping or list of {key}, where it is not filled in: give what "
                    f"has it a line of its own ({key}.KEY: …)"
                )
        yield Command(name, command, files, values)


def candidates(experiment: Experiment) -> list[Row]:
    """The rows that ``tune`` tries: points of a Sobol sequence between the bounds, evenly spaced for one parameter."""
    rows = []
    for method in experiment.groups:
        parameters = experiment.tune.parameters | experiment.tune.own.get(method, {})
        count = experiment.tune.candidates
        if len(parameters) == 1:
            points = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
        else:
            points = torch.quasirandom.SobolEngine(len(parameters), scramble=True, seed=0).draw(
                count, dtype=torch.float64
            )
        found = {}
        for point in points.tolist():
            values = {name: each.at(u) for (name, each), u in zip(parameters.items(), point, strict=True)}
            label = ", ".join(f"{name}={label_of(value)}" for name, value in values.items())
            keys = {parameters[name].key: value for name, value in values.items()}
            found[label] = Row(label, set=keys, groups=[method])
        rows += found.values()
    return rows


def make_plan(path: Path, command: str = "experiment") -> Plan:
    """Read the file of an ``experiment`` or of ``tune``, resolve and check every setting, whether its weights are here or not.

    Whatever would end a run later raises ConfigurationError: keys, values, metrics that nothing measures.
    """
    where, experiment = str(path), read_experiment(path)
    if (experiment.tune is None) != (command == "experiment"):
        other = "tune" if command == "experiment" else "experiment"
        has = "a search (tune)" if other == "tune" else "not a search: it has no tune"
        raise ConfigurationError(f"{where} is {has}. Run calib-guidance {other} --config {where}, or change the file")
    if experiment.tune is not None:
        experiment = dataclasses.replace(experiment, rows=candidates(experiment))
    evaluation = _evaluation(experiment.evaluate, where)
    first = next(iter(experiment.axes), "name")
    named = [*(({first: row.name}, row) for row in experiment.rows), *_grid(experiment.axes)]
    found: dict[tuple[str, str], Setting] = {}
    resolver = _Resolver()
    with subclasses_listed_once(), parts_parsed_once(), without_network():
        for (group, configs), (labels, row) in itertools.product((experiment.groups or {"": []}).items(), named):
            if row.groups is not None and group not in row.groups:
                continue
            said, key = f"{where}, {row.name}", (slug(group), slug(row.name))
            if key in found:
                raise ConfigurationError(f"{where}: two settings have the same name, {row.name}")
            needs = (key[0], slug(row.needs or ""))
            if row.needs is not None and needs not in found:
                raise ConfigurationError(f"{said}: needs {row.needs!r}, which is not a row above")
            needed = (list(found).index(needs), found[needs].digest) if row.needs is not None else (None, None)
            commands = tuple(_commands(experiment, configs, row, said))
            options = tuple(resolver.resolve(command, said) for command in commands)
            found[key] = Setting(group, labels, row.name, commands, options, *needed)
    plan = Plan(path.stem, experiment, tuple(found.values()), evaluation)
    _check_measured(plan, where)
    return plan


def _check_measured(plan: Plan, where: str) -> None:
    """Raise ConfigurationError for columns that no setting has, or that not all have and the ranking needs."""
    halving = plan.experiment.halving
    ranked = [key for text in (halving.metrics if halving else []) for key in parse_objective(text, where).keys]
    for column in plan.columns:
        reasons = [_unmeasured(setting, column, plan.experiment.evaluate is not None) for setting in plan.settings]
        if all(reasons) or (column.key in ranked and any(reasons)):
            reason, setting = next((r, s) for r, s in zip(reasons, plan.settings, strict=True) if r)
            raise ConfigurationError(f"{where}: {column.key} would not be measured with {setting.name}: {reason}")


def _unmeasured(setting: Setting, column: Column, evaluated: bool) -> str | None:
    """Why a run has no such value; None where it has, or where that is not known before."""
    stages = {f"{command.stage}/metrics.json": number for number, command in enumerate(setting.commands)}
    if column.file not in (None, *stages) or column.key not in METRICS:
        return None
    options = setting.options[stages.get(column.file, -1)]
    callback = METRICS[column.key].measured_by
    if evaluated and callback == "SampleQuality":
        return None
    # RunReport writes what the others measure.
    names = [c.class_path.rpartition(".")[2] for c in options.trainer.callbacks or []]
    for needed in (callback, "RunReport"):
        if needed not in names:
            also = ", or evaluate to the experiment" if callback == "SampleQuality" else ""
            return f"add calib_guidance.callbacks.{needed} to trainer.callbacks{also}"
    if column.key == "integral_ece" and options.model.init_args.get("guidance") is None:
        return "it is the error of a guiding classifier, and nothing guides"
    return None
