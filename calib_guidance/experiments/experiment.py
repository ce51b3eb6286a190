"""``calib-guidance experiment --config FILE``: many runs, with several seeds each, as tables and plots."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.distributed import available_cores
from calib_guidance.cli.configs import find_configuration
from calib_guidance.cli.parsed import quietly, without_network
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments.runner import Run, do_runs
from calib_guidance.experiments.settings import Plan, make_plan
from calib_guidance.experiments.tables import Results, insert, mean_and_std, place_of, read_value


def halve(
    settings: Sequence[int],
    rungs: Sequence[int],
    factor: int,
    measure: Callable[[Sequence[int], int], Sequence[float]],
) -> dict[int, int]:
    """Successive halving (Jamieson & Talwalkar 2016): measure all settings on few samples, and the best on more.

    All settings of a rung are measured before any is dropped, so the result does not depend on which run ends first.

    Args:
        settings: to choose from.
        rungs: samples of each rung, ascending.
        factor: one in so many settings is promoted to the next rung, and at least one; ties are promoted together.
        measure: given the settings of a rung and its samples, what each is ranked by; lowest is best.

    Returns:
        The number of samples that each setting got.
    """
    samples, alive = {}, list(settings)
    for rung in rungs:
        values = dict(zip(alive, measure(alive, rung), strict=True))
        samples |= dict.fromkeys(alive, rung)
        last = sorted(values.values())[max(1, len(alive) // factor) - 1]
        alive = [number for number in alive if values[number] <= last]
    return samples


class Experimenter:
    """Does the runs of an experiment.

    Args:
        plan: the experiment.
        output: folder of all experiments.
        workers: runs at a time.
        devices: see :func:`calib_guidance.experiments.runner.do_runs`.
    """

    def __init__(self, plan: Plan, output: Path, workers: int = 1, devices: Sequence[str] = ()):
        self.plan, self.output, self.workers, self.devices = plan, output, workers, devices
        self.runs: dict[tuple[int, int, int], Run] = {}  # that are done, by setting, seed and number of samples
        self.made = 0  # how many of them this object did

    def make(self, settings: Sequence[int], num_samples: int) -> None:
        """Do what is left of the runs of some settings; SystemExit where some failed."""
        runs = self.plan.runs(settings, num_samples, self.output)
        todo = list({run.folder: run for run in runs if not run.done()}.values())
        before = f"{len({run.folder for run in runs}) - len(todo)} runs done before"
        before = f"{num_samples} samples, {before}" if num_samples else before
        if failed := do_runs(todo, self.workers, self.devices, before):
            logs = ", ".join(str(run.folder / "log.txt") for run in failed[:3])
            failures = f"{len(failed)} of {len(runs)} runs failed. Logs: {logs}"
            raise SystemExit(f"{failures}. Re-run the command to do what is left")
        self.made += len(todo)
        self.runs |= {(run.setting, run.seed, num_samples): run for run in runs if run.setting in settings}

    def rank(self, settings: Sequence[int], num_samples: int) -> list[float]:
        """Mean over seeds of what settings are ranked by, negative where higher is better."""
        experiment = self.plan.experiment
        key = experiment.halving.rank_by(num_samples, experiment.num_samples)
        column = next(column for column in self.plan.columns if column.key == key)
        ranked = []
        for number in settings:
            values = [read_value(column, self.runs[number, seed, num_samples].folder) for seed in experiment.seeds]
            if None in values:
                name = self.plan.settings[number].name
                raise ConfigurationError(f"{name}: settings cannot be ranked by {key}: a run has no such value")
            ranked.append(column.sign * mean_and_std(values)[0])
        return ranked

    def run(self, rows: Sequence[int] = ()) -> Results:
        """Run the complete experiment, or some rows of it (without halving)."""
        experiment, settings = self.plan.experiment, rows or range(len(self.plan.settings))
        if experiment.halving is None or rows:
            self.make(settings, experiment.num_samples)
            return Results(self.plan, dict.fromkeys(settings, experiment.num_samples), self.runs)

        def measure(asked: Sequence[int], num_samples: int) -> list[float]:
            self.make(asked, num_samples)
            return self.rank(asked, num_samples)

        rungs = experiment.halving.rungs(experiment.num_samples)
        return Results(self.plan, halve(settings, rungs, experiment.halving.factor, measure), self.runs)


def _devices(text: str | None) -> list[str]:
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


def _write(results: Results, folder: Path, into: Path | None) -> None:
    """Write tables, CSV files, plots and links, and print the tables."""
    plan, paths = results.plan, []
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for mark in plan.experiment.tables:
        text = results.markdown(mark)
        paths.append(folder / f"{mark}.md")
        write_text(paths[-1], text + "\n")
        print(f"\n{text}")
        if into is not None:
            insert(text, mark, into)
    for column in plan.columns:
        if all(value is None for number in results.samples for value in results.values(number, column)):
            print(f"note: no run has {column.key} in {column.file or 'metrics.json'}, for column {column.title!r}")
    results.write_csv(folder)
    results.link(folder)
    paths += [folder / "settings.csv", folder / "runs.csv", *results.draw(folder / "plots")]
    print(f"\nbest by {plan.columns[0].key}: {plan.settings[results.order()[0]].name}")
    print("wrote", *paths, sep="\n  ")


def experiment(argv: Sequence[str]) -> None:
    """``calib-guidance experiment``: do the runs of an experiment, print its tables and draw its plots.

    Writes ``OUTPUT/NAME/`` with the tables, ``settings.csv``, ``runs.csv``, ``plots/`` and links by name to the runs, which
    are in ``OUTPUT/runs/``; completed runs are skipped. With ``--row`` the folder is ``OUTPUT/NAME/rows``. Exit status 1
    where runs failed.
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
    devices = _devices(options.devices)
    workers = options.workers or len(devices) or min(available_cores(), 4)
    experimenter = Experimenter(plan, options.output, workers, devices)
    results = experimenter.run(rows)
    _write(results, options.output / plan.name / ("rows" if rows else ""), options.into)
    print(f"{experimenter.made} runs in {(time.monotonic() - started) / 60:.1f} minutes")
