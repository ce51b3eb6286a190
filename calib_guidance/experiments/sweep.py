"""``calib-guidance sweep --config FILE``: sampling over values of configuration keys, as a table and figures."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import time
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import Namespace

from calib_guidance.cli.configs import expand_bases
from calib_guidance.cli.doctor.files import missing_files
from calib_guidance.cli.lightning import innermost, run_lightning, shorten, subclasses_listed_once
from calib_guidance.cli.parsed import ParsedCLI, all_options, use_random_weights, without_network
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.evaluation.evaluate import read_options
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.experiments.runner import (
    OVERLAYS,
    QUIET,
    Run,
    cell,
    check_keys,
    do_runs,
    mean_and_deviation,
    sources,
)
from calib_guidance.plots import ablation, precision_recall

_KEYS = {"configs", "set", "num_samples", "seeds", "values", "figures", "halving", "evaluate"}
_LISTS, _MAPPINGS = ("configs", "seeds", "figures"), ("set", "values", "halving", "evaluate")
_NEEDED = ("configs", "num_samples", "seeds", "values", "figures")
_NUM_SAMPLES, _SEED, _FOLDER = "data.init_args.num_samples", "data.init_args.seed", "trainer.default_root_dir"
_OWN = {_NUM_SAMPLES: "num_samples", _SEED: "seeds", _FOLDER: "--output"}  # keys that a sweep says in another place


class Figure(NamedTuple):
    """What a run measures.

    Attributes:
        title: above its column.
        digits: after the point.
        sign: 1 where the lowest is best, −1 where the highest is.
        measured_by: the callback that puts it into metrics.json; ``evaluate`` measures what SampleQuality does.
    """

    title: str
    digits: int
    sign: int
    measured_by: str = "SampleQuality"


FIGURES = {
    "frechet_distance": Figure("Fréchet ↓", 2, 1),
    "spatial_frechet_distance": Figure("spatial Fréchet ↓", 2, 1),
    "inception_score": Figure("Inception score ↑", 1, -1),
    "kernel_distance": Figure("kernel distance ↓", 4, 1),
    "precision": Figure("precision ↑", 3, -1),
    "recall": Figure("recall ↑", 3, -1),
    "density": Figure("density ↑", 3, -1),
    "coverage": Figure("coverage ↑", 3, -1),
    "classifier_accuracy": Figure("accuracy ↑", 3, -1),
    "classifier_ece": Figure("classifier ECE ↓", 3, 1),
    "clip_score": Figure("CLIP score ↑", 4, -1, "CLIPScore"),
    "integral_ece": Figure("integral ECE ↓", 3, 1, "TrajectoryCalibration"),
    "seconds_per_image": Figure("s / image ↓", 4, 1, "SampleWriter"),
}


@dataclass(frozen=True)
class Axis:
    """What a sweep varies.

    Attributes:
        name: of the axis, in names of settings, tables and figures.
        key: dotted key of the configuration; None where overlays are varied.
        values: of the key, or lists of names of overlays.
        labels: of the values, for people.
    """

    name: str
    key: str | None
    values: tuple[Any, ...]
    labels: tuple[str, ...]

    def place(self, label: str) -> float | str:
        """Where a value stands on the axis of a figure: a number where all of them are."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)
        return float(self.values[self.labels.index(label)]) if numbers and self.key else label


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes:
        labels: the label of its value, by axis.
        configs: configuration files, later ones override.
        values: of configuration keys, which override the files.
        options: the resolved configuration, without number of samples, seed and folder.
    """

    labels: Mapping[str, str]
    configs: tuple[str, ...]
    values: Mapping[str, Any]
    options: Namespace

    @property
    def name(self) -> str:
        return _name(self.labels)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of all that its samples and figures are a function of, beside their number and seed."""
        options = {key: value for key, value in self.options.as_dict().items() if key != "config"}
        # What callbacks name may be what they write: of theirs only weights count.
        used = [o for part in ("model", "data") for o in all_options(self.options[part], part)]
        used += [o for o in all_options(self.options.trainer, "trainer") if o.is_weights]
        files = sorted({o.value for o in used if isinstance(o.value, str) and os.path.isfile(o.value)})
        hashes = [_file_hash(path) for path in files]
        text = json.dumps([options, hashes], sort_keys=True, default=str, ensure_ascii=False)
        return hashlib.sha256(text.encode() + sources()).hexdigest()

    def unmeasured(self, key: str, evaluated: bool) -> str | None:
        """Why a run of the setting has no such figure; None where it has."""
        callback = FIGURES[key].measured_by
        if evaluated and callback == "SampleQuality":
            return None
        if not any(c.class_path.rpartition(".")[2] == callback for c in self.options.trainer.callbacks or []):
            also = ", or evaluate to the sweep" if callback == "SampleQuality" else ""
            return f"add calib_guidance.callbacks.{callback} to trainer.callbacks{also}"
        if key == "integral_ece" and self.options.model.init_args.get("guidance") is None:
            return "it is the error of a guiding classifier, and nothing guides"
        return None


@dataclass(frozen=True)
class Halving:
    """Which settings get more samples.

    Attributes:
        by: figures that settings are ranked by: at the first rung, the second …; the last one from there on.
        rungs: samples of each rung, the last those of the sweep.
        factor: one in so many settings goes on.
    """

    by: tuple[str, ...]
    rungs: tuple[int, ...]
    factor: int

    def rank_by(self, num_samples: int) -> str:
        """The figure that settings with so many samples are ranked by."""
        return self.by[min(self.rungs.index(num_samples), len(self.by) - 1)]


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for.

    Attributes:
        name: of the file.
        axes: what is varied.
        settings: the grid.
        seeds: of each setting's runs.
        num_samples: of each run.
        figures: keys of :data:`FIGURES`, those that are collected.
        halving: None where every setting gets all samples.
        evaluate: options of ``calib-guidance evaluate``, which then measures each run; None where predict's figures are all.
    """

    name: str
    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    num_samples: int
    figures: tuple[str, ...]
    halving: Halving | None
    evaluate: Mapping[str, Any] | None

    def runs(self, settings: Sequence[int], num_samples: int, output: Path) -> list[Run]:
        """The runs of some settings, by number, each with every seed.

        A run's folder is named by all that its result depends on, so that sweeps with the same runs share them. One begins
        with the samples that its setting has already, more or fewer.

        Args:
            settings: numbers of settings.
            num_samples: of each run.
            output: folder of all sweeps.
        """
        runs = []
        for number in settings:
            setting = self.settings[number]
            for seed in self.seeds:
                stem = hashlib.sha256(f"{setting.digest} {seed}".encode()).hexdigest()[:16]
                folder = output / "runs" / f"{stem}-{num_samples}"
                content = _nested(setting.values | {_SEED: seed, _NUM_SAMPLES: num_samples})
                words = ["predict", *(word for config in setting.configs for word in ("--config", config))]
                words += ["--config", yaml.safe_dump(content, allow_unicode=True)]
                options = self._evaluation(num_samples)
                if options:
                    named = [word.removeprefix("classifier:") for word in options]
                    files = [_file_hash(path) for path in named if Path(path).is_file()]
                    of = hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()[:8]
                    folder = folder.with_name(f"{folder.name}-{of}")
                words += [f"--{_FOLDER}={folder}", *QUIET]
                commands = [tuple(expand_bases(words))]
                commands += [("evaluate", str(folder), *options)] if options else []
                same = tuple(path for path in sorted(folder.parent.glob(f"{stem}-*")) if path != folder)
                runs.append(Run(number, seed, tuple(commands), folder, folder.name, same=same, num_samples=num_samples))
        return runs

    def _evaluation(self, num_samples: int) -> list[str]:
        """Words for ``evaluate``: of runs with all samples, and where the ranking needs it. Few samples may be too few for it."""
        rungs = self.halving.rungs if self.halving else ()
        ranked = num_samples in rungs and FIGURES[self.halving.rank_by(num_samples)].measured_by == "SampleQuality"
        if not self.evaluate or not (ranked or num_samples == self.num_samples):
            return []
        return _words(self.evaluate)

    def read(self, run: Run) -> dict[str, float | None]:
        """The figures of a run that is done; None where it measured no such thing."""
        found: dict[str, Any] = {}
        for path in (run.folder / "metrics.json", run.folder / "evaluation" / "metrics.json"):
            found |= json.loads(path.read_text()) if path.is_file() else {}
        return {key: found.get(key) for key in self.figures}


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as on a command line."""
    given = {f"--{option}": value for option, value in options.items() if value is not False}
    return [word for option, value in given.items() for word in ([option] if value is True else [option, str(value)])]


@functools.cache
def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings in mappings for dotted keys."""
    content: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        node = content
        for word in above:
            node = node.setdefault(word, {})
        node[last] = value
    return content


def _keys(node: object, above: str = "") -> Iterator[str]:
    """Dotted keys of all below a resolved configuration."""
    for key, value in (vars(node) if isinstance(node, Namespace) else {}).items():
        yield above + key
        yield from _keys(value, f"{above}{key}.")


def _name(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in labels.items())


def _label(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_axis(name: str, content: object, where: str) -> Axis:
    where = f"{where}, values of {name!r}"
    if not isinstance(content, dict) or ("overlays" in content) == ("key" in content):
        raise ConfigurationError(f"{where}: expected overlays: [FILE, …], or key: KEY and values: [VALUE, …]")
    check_keys(content, {"overlays"} if "overlays" in content else {"key", "values"}, where)
    key = content.get("key")
    values = content.get("values" if key else "overlays")
    if not isinstance(values, list) or not values:
        raise ConfigurationError(f"{where}: expected a list of at least one, got {values!r}")
    if key in _OWN:
        raise ConfigurationError(f"{where}: a sweep says {key} as {_OWN[key]}")
    if key:
        labels = [_label(value) for value in values]
    else:
        values = [[value] if isinstance(value, str) else value for value in values]
        labels = ["+".join(Path(overlay).name for overlay in value) for value in values]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigurationError(f"{where}: two settings would have the same name, {name} = {twice[0]}")
    return Axis(name, key, tuple(values), tuple(labels))


def _read_figures(keys: Sequence[str], where: str) -> tuple[str, ...]:
    for key in keys:
        if key not in FIGURES:
            near = difflib.get_close_matches(key, FIGURES, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigurationError(f"{where}: there is no figure {key!r}{hint}; there are: {', '.join(FIGURES)}")
    return tuple(keys)


def _read_halving(
    content: Mapping[str, Any] | None, figures: Sequence[str], num_samples: int, where: str
) -> Halving | None:
    if content is None:
        return None
    where = f"{where}, halving"
    check_keys(content, {"by", "samples", "factor"}, where)
    by = content.get("by") or []
    by = [by] if isinstance(by, str) else by
    if not by:
        raise ConfigurationError(f"{where}: by says by which figure settings are ranked, and it is not there")
    if missing := [key for key in by if key not in figures]:
        raise ConfigurationError(
            f"{where}: settings cannot be ranked by {missing[0]!r}, which is not among the figures"
        )
    first, factor = content.get("samples", 0), content.get("factor", 3)
    if not isinstance(first, int) or not 0 < first < num_samples:
        raise ConfigurationError(f"{where}: samples must be a number from 1 to {num_samples - 1}, got {first!r}")
    if not isinstance(factor, int) or factor < 2:
        raise ConfigurationError(f"{where}: factor must be a whole number of at least 2, got {factor!r}")
    rungs = [first]
    while rungs[-1] * factor < num_samples:
        rungs.append(rungs[-1] * factor)
    return Halving(tuple(by), (*rungs, num_samples), factor)


def _build(cli: ParsedCLI, options: Namespace) -> None:
    """Build the parts of a configuration without memory for its weights, for what their constructors refuse."""
    model = copy.deepcopy(options.model)
    for option in list(all_options(model, "model")):
        if option.is_weights:
            use_random_weights(option)
    with torch.device("meta"):
        module = cli.build("model", model)
    module.sampler.check(module.denoiser, module.guidance)
    cli.build("data", options.data)


class _Resolver:
    """Resolves settings, each set of files once."""

    def __init__(self, where: str):
        self.where = where
        self._known: dict[tuple[str, ...], tuple[ParsedCLI, bool]] = {}

    def _files(self, configs: tuple[str, ...]) -> tuple[ParsedCLI, bool]:
        """The files' configuration, and whether it can be built here: not where a missing file tells an architecture."""
        if configs not in self._known:
            if missing := [config for config in configs if not Path(config).is_file()]:
                raise ConfigurationError(f"{self.where}: no such files: {', '.join(missing)}")
            words = [word for config in configs for word in ("--config", config)]
            cli = run_lightning(["predict", *words], ParsedCLI)
            if cli.trains:
                raise ConfigurationError(
                    f"{self.where}: sweeps sample, and {', '.join(configs)} trains; compare does fit"
                )
            try:
                _build(cli, cli.options)
                built = True
            except Exception:  # whatever is wrong without the sweep's values is said by doctor and by the run
                built = False
            self._known[configs] = cli, built
        return self._known[configs]

    def resolve(self, configs: tuple[str, ...], values: Mapping[str, Any], name: str) -> Namespace:
        """The configuration of a setting.

        Raises:
            ConfigurationError: a key that it does not have, or a value that it refuses.
        """
        where = f"{self.where}, {name}"
        cli, built = self._files(configs)
        known = list(_keys(cli.options))
        for key in (*values, *_OWN):
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; the closest is {near[0]}" if near else ""
                raise ConfigurationError(f"{where}: the configuration has no key {key}{hint}")
        content = {key: value for key, value in cli.options.as_dict().items() if key != "config"}
        for key, value in (dict(values) | {_NUM_SAMPLES: 1, _SEED: 0, _FOLDER: "."}).items():
            *above, last = key.split(".")
            functools.reduce(lambda node, word: node[word], above, content)[last] = copy.deepcopy(value)
        try:
            options = cli.parse(content)
            if built:
                _build(cli, options)
        except ArgumentError as error:
            raise ConfigurationError(f"{where}: {shorten(str(error))}") from error
        except (ValueError, RuntimeError, CheckpointError) as error:
            raise ConfigurationError(f"{where}: {innermost(error)}") from error
        return options


def read_sweep(path: Path) -> Sweep:
    """A sweep file, every setting of it resolved.

    It has the keys ``configs`` (configuration files), ``num_samples``, ``seeds``, ``values`` (by name: ``key`` and ``values``, or
    ``overlays``, files of lightning_configs/ without the ending, or lists of such; the settings are the grid of all of them),
    ``figures`` (keys of :data:`FIGURES`), and optionally ``set`` (values of dotted keys, for all settings), ``halving`` (``by``,
    a figure or one for each rung; ``samples`` of the first rung; ``factor``, 3) and ``evaluate`` (options of that command).
    Overlays come after ``configs``, then ``set``, then ``values``.

    Raises:
        ConfigurationError: no such file, unknown keys, of the file or of the configuration (naming the closest), values that the
            configuration refuses, settings of one name, figures that are unknown or that nothing would measure, and a halving
            without a figure to rank by.
    """
    if not path.is_file():
        raise ConfigurationError(f"sweep: no such file: {path}")
    where = str(path)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where}: expected a mapping with the keys {', '.join(_NEEDED)}")
    check_keys(content, _KEYS, where)
    if missing := [key for key in _NEEDED if not content.get(key)]:
        raise ConfigurationError(f"{where}: {missing[0]} is not there, or empty")
    for keys, kind, name in ((_LISTS, list, "a list"), (_MAPPINGS, dict, "a mapping")):
        for key in keys:
            if not isinstance(content.get(key), kind | None):
                raise ConfigurationError(f"{where}: {key} must be {name}, got {content[key]!r}")
    num_samples, seeds, evaluate = content["num_samples"], content["seeds"], content.get("evaluate")
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ConfigurationError(f"{where}: num_samples must be at least 1, got {num_samples!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"{where}: a seed occurs twice: {seeds}")
    figures = _read_figures(content["figures"], where)
    halving = _read_halving(content.get("halving"), figures, num_samples, where)
    _check_evaluation(evaluate, where)
    axes = tuple(_read_axis(str(name), axis, where) for name, axis in content["values"].items())
    settings = _settings(content, axes, where)
    for key in figures:
        reasons = [setting.unmeasured(key, evaluate is not None) for setting in settings]
        if all(reasons) or (halving is not None and key in halving.by and any(reasons)):
            reason, setting = next((r, s) for r, s in zip(reasons, settings, strict=True) if r)
            raise ConfigurationError(f"{where}: {key} would not be measured with {setting.name}: {reason}")
    return Sweep(path.stem, axes, settings, tuple(seeds), num_samples, figures, halving, evaluate)


def _check_evaluation(options: Mapping[str, Any] | None, where: str) -> None:
    """Raise ConfigurationError for options that the command would refuse once a run is sampled."""
    if options is None:
        return
    if "reference" not in options:
        raise ConfigurationError(f"{where}: evaluate compares with a reference: add reference: FILE to it")
    if "output" in options:
        raise ConfigurationError(f"{where}, evaluate: what it finds is kept with each run: take output out")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            read_options(["RUN", *_words(options)])
        except SystemExit:
            raise ConfigurationError(f"{where}, evaluate: {said.getvalue().rpartition('error: ')[2].strip()}") from None


def _settings(content: Mapping[str, Any], axes: Sequence[Axis], where: str) -> tuple[Setting, ...]:
    """The grid of all axes, resolved."""
    resolver, settings = _Resolver(where), []
    with subclasses_listed_once():
        for numbers in itertools.product(*(range(len(axis.values)) for axis in axes)):
            chosen = [(axis, axis.values[number]) for axis, number in zip(axes, numbers, strict=True)]
            labels = {axis.name: axis.labels[number] for axis, number in zip(axes, numbers, strict=True)}
            overlays = [overlay for axis, value in chosen if axis.key is None for overlay in value]
            configs = (*content["configs"], *(str(OVERLAYS / f"{overlay}.yaml") for overlay in overlays))
            values = dict(content.get("set") or {}) | {axis.key: value for axis, value in chosen if axis.key}
            settings.append(Setting(labels, configs, values, resolver.resolve(configs, values, _name(labels))))
    return tuple(settings)


def _check_files(sweep: Sweep) -> None:
    """Raise ConfigurationError for weights, or files for the evaluation, that are not here."""
    for option in ("reference", "features", "eval_classifier", "clip"):
        path = Path(str((sweep.evaluate or {}).get(option, "")).removeprefix("classifier:"))
        if path.suffix in (".npz", ".yaml", ".yml") and not path.exists():  # not the name of a data set
            raise ConfigurationError(f"{sweep.name}: evaluate's {option} {path} is not there")
    for setting in sweep.settings:
        if missing := missing_files(setting.options):
            raise ConfigurationError(f"{setting.name}: {missing[0]}")


class Sweeper:
    """Does the runs of a sweep.

    Args:
        sweep: what to do.
        output: folder of all sweeps.
        workers: runs at a time.
        devices: see :func:`calib_guidance.experiments.runner.do_runs`.

    Attributes:
        results: figures of the runs that are done, by setting, seed and number of samples.
        folders: where they are.
        made: how many were done by this object.
    """

    def __init__(self, sweep: Sweep, output: Path, workers: int = 1, devices: Sequence[str] = ()):
        self.sweep, self.output, self.workers, self.devices = sweep, output, workers, devices
        self.results: dict[tuple[int, int, int], dict[str, float | None]] = {}
        self.folders: dict[tuple[int, int, int], Path] = {}
        self.made = 0

    def make(self, settings: Sequence[int], num_samples: int) -> None:
        """Do what is left of the runs of some settings.

        Raises:
            SystemExit: with status 1 where runs failed, naming their logs.
        """
        runs = self.sweep.runs(settings, num_samples, self.output)
        todo = list({run.folder: run for run in runs if not run.done()}.values())
        before = f"{num_samples} samples, {len({run.folder for run in runs}) - len(todo)} runs done before"
        failed = do_runs(todo, self.workers, self.devices, before)
        if failed:
            raise SystemExit(
                f"{len(failed)} of {len(runs)} runs failed; their logs say why, and the same command does what is left: "
                + ", ".join(str(run.folder / "log.txt") for run in failed[:3])
            )
        self.made += len(todo)
        for run in runs:
            self.results[run.row, run.seed, num_samples] = self.sweep.read(run)
            self.folders[run.row, run.seed, num_samples] = run.folder

    def values(self, setting: int, num_samples: int, key: str) -> list[float | None]:
        """A figure of a setting, by seed."""
        return [self.results[setting, seed, num_samples][key] for seed in self.sweep.seeds]

    def rank(self, settings: Sequence[int], num_samples: int) -> list[float]:
        """Mean over seeds of what settings are ranked by, negative where the highest is best.

        Raises:
            ConfigurationError: a run has no such figure.
        """
        key = self.sweep.halving.rank_by(num_samples)
        ranked = []
        for number in settings:
            values = self.values(number, num_samples, key)
            if None in values:
                name = self.sweep.settings[number].name
                raise ConfigurationError(f"{name}: settings cannot be ranked by {key}: a run of it has none")
            ranked.append(FIGURES[key].sign * sum(values) / len(values))
        return ranked

    def run(self) -> list[int]:
        """Do the whole sweep.

        Returns:
            The samples of each setting.
        """
        everything = range(len(self.sweep.settings))
        if self.sweep.halving is None:
            self.make(everything, self.sweep.num_samples)
            return [self.sweep.num_samples] * len(everything)
        from calib_guidance.experiments.halving import halve  # Optuna is an extra

        def measure(settings: Sequence[int], num_samples: int) -> list[float]:
            self.make(settings, num_samples)
            return self.rank(settings, num_samples)

        labels = [setting.labels for setting in self.sweep.settings]
        return halve(labels, self.sweep.halving.rungs, self.sweep.halving.factor, measure)[0]


def _order(sweeper: Sweeper, samples: Sequence[int]) -> list[int]:
    """Settings from the best to the worst: by samples that they got, then by the first figure."""
    key = sweeper.sweep.figures[0]

    def place(number: int) -> tuple[int, float]:
        mean, _ = mean_and_deviation(sweeper.values(number, samples[number], key))
        return -samples[number], float("inf") if mean is None else FIGURES[key].sign * mean

    return sorted(range(len(samples)), key=place)


def table(sweeper: Sweeper, samples: Sequence[int]) -> str:
    """One line a setting in Markdown, mean ± standard deviation over seeds; those that halving ended earlier come last."""
    sweep = sweeper.sweep
    axes = [axis.name for axis in sweep.axes]
    counted = ["samples"] if sweep.halving else []
    titles = [*axes, *counted, *(FIGURES[key].title for key in sweep.figures)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(axes) + "|" + "---:|" * (len(titles) - len(axes))]
    for number in _order(sweeper, samples) if sweep.halving else range(len(samples)):
        count = samples[number]
        words = [sweep.settings[number].labels[axis] for axis in axes]
        words += [f"{count:,}"] if sweep.halving else []
        words += [cell(sweeper.values(number, count, key), FIGURES[key].digits) for key in sweep.figures]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def _write_csv(sweeper: Sweeper, samples: Sequence[int], folder: Path) -> None:
    """``settings.csv``, a line a setting with mean and standard deviation, and ``runs.csv``, a line a run."""
    sweep = sweeper.sweep
    axes = [axis.name for axis in sweep.axes]
    with open(folder / "settings.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*axes, "num_samples", *(f"{key}{end}" for key in sweep.figures for end in ("", "_sd"))])
        for number, count in enumerate(samples):
            pairs = [mean_and_deviation(sweeper.values(number, count, key)) for key in sweep.figures]
            writer.writerow([*sweep.settings[number].labels.values(), count, *itertools.chain(*pairs)])
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*axes, "seed", "num_samples", *sweep.figures, "folder"])
        for (number, seed, count), found in sorted(sweeper.results.items()):
            path = sweeper.folders[number, seed, count]
            writer.writerow([*sweep.settings[number].labels.values(), seed, count, *found.values(), path])


def draw(sweeper: Sweeper, samples: Sequence[int], folder: Path) -> list[Path]:
    """Figures over each axis, the others held at the best setting's values; with the most samples that all its points have."""
    sweep, paths = sweeper.sweep, []
    best = sweep.settings[_order(sweeper, samples)[0]]
    for axis in sweep.axes:
        others = [other.name for other in sweep.axes if other is not axis]
        slice_ = [n for n, s in enumerate(sweep.settings) if all(s.labels[o] == best.labels[o] for o in others)]
        if len(slice_) < 2:
            continue
        count = min(samples[number] for number in slice_)
        points = []
        for number in slice_:
            values = {key: mean_and_deviation(sweeper.values(number, count, key)) for key in sweep.figures}
            known = {key: pair for key, pair in values.items() if pair[0] is not None}
            points.append((axis.place(sweep.settings[number].labels[axis.name]), known))
        stem, held = folder / re.sub(r"\W+", "-", axis.name), _name({other: best.labels[other] for other in others})
        if any(known for _, known in points):
            labels = {key: METRICS[key].title for key in sweep.figures}
            paths += ablation(points, axis.name, stem, held=held, labels=labels)
        if all({"precision", "recall"} <= known.keys() for _, known in points):
            paths += precision_recall(points, axis.name, stem.with_name(f"{stem.name}-precision-recall"), held)
    return paths


def _devices(text: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be, one after the other: what was asked for, or every device that is seen."""
    if text is not None:
        return [word for word in text.split(",") if word]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else map(str, itertools.count())
    return list(itertools.islice(names, torch.cuda.device_count()))


def sweep(args: Sequence[str]) -> None:
    """Do the runs of a sweep, print its table and draw its figures; what is done, in this sweep or another, is not repeated.

    Writes ``OUTPUT/NAME/`` with ``table.md``, ``settings.csv``, ``runs.csv`` and ``figures/``; the runs are in ``OUTPUT/runs/``.

    Args:
        args: words of the command line after ``sweep``.

    Raises:
        ConfigurationError: a sweep file that cannot be run, see :func:`read_sweep`.
        SystemExit: with status 1 where runs failed, naming their logs.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance sweep", description="Sampling over values of configuration keys, as a table and figures."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="sweep file, e.g. lightning_configs/sweep/digits_tau2.yaml"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"), help="folder of all sweeps (%(default)s)")
    parser.add_argument(
        "--workers", type=int, help="runs at a time (one for each device, or on a CPU as many as cores, up to 4)"
    )
    parser.add_argument("--devices", help="GPUs, e.g. 0,1,3 (those of CUDA_VISIBLE_DEVICES, or all); a run uses one")
    options = parser.parse_args(list(args))
    started, disabled = time.monotonic(), logging.root.manager.disable
    logging.disable(logging.INFO)  # what Lightning says of seeds and devices
    try:
        with warnings.catch_warnings(), without_network():
            warnings.simplefilter("ignore")
            asked = read_sweep(options.config)
            _check_files(asked)
    finally:
        logging.disable(disabled)
    if asked.halving is not None:
        import calib_guidance.experiments.halving  # noqa: F401  # before the first run where it is missing
    devices = _devices(options.devices)
    workers = options.workers or len(devices) or min(os.cpu_count() or 1, 4)
    sweeper = Sweeper(asked, options.output, workers, devices)
    samples = sweeper.run()
    folder = options.output / asked.name
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    text = table(sweeper, samples)
    (folder / "table.md").write_text(text + "\n")
    _write_csv(sweeper, samples, folder)
    paths = draw(sweeper, samples, folder / "figures")
    best = asked.settings[_order(sweeper, samples)[0]]
    print(f"\n{text}\n\nbest by {asked.figures[0]}: {best.name}")
    paths = [*(folder / name for name in ("table.md", "settings.csv", "runs.csv")), *paths]
    print("wrote\n" + "\n".join(f"  {path}" for path in paths))
    print(f"{sweeper.made} runs in {(time.monotonic() - started) / 60:.1f} minutes")
