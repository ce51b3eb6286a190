"""``calib-guidance compare --config FILE``: many runs, several seeds each, as tables."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from calib_guidance.configurations import expand_bases
from calib_guidance.errors import ConfigurationError, LeftOutError
from calib_guidance.lightning_cli import run_lightning

_OVERLAYS = Path("lightning_configs")
_KEYS = {"stages", "seeds", "tables", "groups", "rows"}
_ROW_KEYS = {"name", "overlays", "arguments", "groups", "needs", "commands"}
_STAGE_KEYS = {"command", "configs", "arguments"}
_QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
        title: above the column.
        file: JSON file in the run's folder.
        key: of the figure in it, with dots into mappings and lists, e.g. ``ece.by_level.3``.
        digits: after the point.
    """

    title: str
    file: str
    key: str
    digits: int = 3

    def read(self, folder: Path) -> float | None:
        """The figure that a run measured, or None where it measured no such thing."""
        path = folder / self.file
        value = json.loads(path.read_text()) if path.is_file() else None
        for word in self.key.split("."):
            known = dict(enumerate(value)) if isinstance(value, list) else value or {}
            value = known.get(int(word) if isinstance(value, list) else word)
        return value


@dataclass(frozen=True)
class Table:
    """A table of a comparison.

    Attributes:
        mark: where ``--into`` puts it, between ``<!-- mark -->`` and ``<!-- /mark -->``.
        title: above the names of the rows.
        columns: its figures.
    """

    mark: str
    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        row: index of its row.
        seed: of what is random in it.
        commands: words for the command line, one after the other.
        folder: where it writes.
        fingerprint: hash of all that changes its result.
        needs: folder of a run that must be done before it, or None.
    """

    row: int
    seed: int
    commands: tuple[tuple[str, ...], ...]
    folder: Path
    fingerprint: str
    needs: Path | None = None

    def done(self) -> bool:
        """Whether an earlier run with the same fingerprint came to its end."""
        mark = self.folder / "fingerprint"
        return mark.is_file() and mark.read_text() == self.fingerprint


@dataclass(frozen=True)
class Comparison:
    """What a comparison file asks for.

    Attributes:
        tables: to make.
        rows: (group, name) of each row.
        runs: every row with every seed.
    """

    tables: tuple[Table, ...]
    rows: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]


def _fingerprint(commands: Sequence[Sequence[str]], sources: bytes) -> str:
    """Hash of the words, the configurations and the weights that they name, and the package's own sources."""
    digest = hashlib.sha256(json.dumps(commands).encode() + sources)
    words = [word for command in commands for word in command]
    configs = [Path(word) for word in words if "\n" not in word and Path(word).is_file()]
    texts = [*words, *(config.read_text() for config in configs)]
    weights = sorted({w for text in texts for w in re.findall(r"[\w./-]+\.(?:safetensors|pth?|ckpt)", text)})
    for path in (*configs, *map(Path, weights)):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _work(run: Run, threads: int) -> list[str]:
    """Do one run in a worker process, its output in a file beside what it writes.

    One that was interrupted goes on where it can; what another configuration or other code has left is removed.

    Returns:
        What is to be said of the run although it is done.
    """
    remarks = []
    torch.set_num_threads(threads)
    begun, done = run.folder / "begun", run.folder / "fingerprint"
    if not begun.is_file() or begun.read_text() != run.fingerprint:
        shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    begun.write_text(run.fingerprint)
    with open(run.folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for words in run.commands:
            try:
                run_lightning(words)
            except LeftOutError as error:  # its figures are those of the samples that there are
                remarks.append(str(error))
    done.write_text(run.fingerprint)
    return remarks


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _check_keys(found: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := found.keys() - known:
        raise ConfigurationError(f"{where}: unknown keys {sorted(unknown)}; known: {sorted(known)}")


def _for_stage(words: Sequence[str] | Mapping[str, Sequence[str]] | None, stage: str) -> list[str]:
    """Overlays or arguments for one stage: of all stages where they are a list."""
    return list(words.get(stage, ()) if isinstance(words, Mapping) else words or ())


def _fill(text: str, known: Mapping[str, object]) -> str:
    for place, value in known.items():
        text = text.replace(place, str(value))
    return text


def read_comparison(path: Path, output: Path) -> Comparison:
    """A comparison file.

    It has the keys ``stages`` (the commands of a run, one after the other: ``command``, ``configs``, ``arguments``), ``seeds``,
    ``tables`` (by mark: ``title`` and ``columns``), ``groups`` (name to overlays, applied first) and ``rows`` (``name``,
    ``overlays``, and optionally ``arguments``, the ``groups`` that the row is for, ``commands``, which take the place of
    stages' own, and ``needs``, the name of a row above that must be done before). Overlays are files of lightning_configs/,
    without the ending. Overlays and arguments are a list for all stages, or a mapping of stages to lists. In arguments
    ``{seed}`` and ``{folder}`` stand for those of the run, ``{needed}`` for the folder of the needed row's run of that seed.

    Raises:
        ConfigurationError: no such file, unknown keys, missing overlays or no such row above.
    """
    if not path.is_file():
        raise ConfigurationError(f"compare: no such file: {path}")
    content = yaml.safe_load(path.read_text())
    _check_keys(content, _KEYS, str(path))
    for name, stage in content["stages"].items():
        _check_keys(stage, _STAGE_KEYS, f"{path}, stage {name!r}")
    # A change of the code may change what comes out, so it makes old runs stale.
    sources = b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.rglob("*.py")))
    rows: list[tuple[str, str]] = []
    runs = []
    for group, group_overlays in content["groups"].items():
        for row in content["rows"]:
            _check_keys(row, _ROW_KEYS, f"{path}, row {row.get('name')!r}")
            if group not in row.get("groups", [group]):
                continue
            for seed in content["seeds"]:
                folder = output / _slug(group) / _slug(row["name"]) / f"seed{seed}"
                needed = None
                if "needs" in row:
                    needed = output / _slug(group) / _slug(row["needs"]) / f"seed{seed}"
                    if (group, row["needs"]) not in rows:
                        raise ConfigurationError(
                            f"{path}, row {row['name']!r}: needs {row['needs']!r}, which no row above is"
                        )
                commands = []
                for stage, settings in content["stages"].items():
                    names = [*_for_stage(group_overlays, stage), *_for_stage(row.get("overlays"), stage)]
                    configs = [*settings["configs"], *(str(_OVERLAYS / f"{name}.yaml") for name in names)]
                    if missing := [c for c in configs if not Path(c).is_file()]:
                        raise ConfigurationError(f"{path}, row {row['name']!r}: no such files: {', '.join(missing)}")
                    arguments = [*settings.get("arguments", ()), *_for_stage(row.get("arguments"), stage)]
                    command = row.get("commands", {}).get(stage, settings["command"])
                    words = [command, *(word for config in configs for word in ("--config", config))]
                    known = {"{seed}": seed, "{folder}": folder, "{needed}": needed}
                    words += [_fill(argument, known) for argument in arguments]
                    commands.append((*expand_bases(words), *_QUIET))
                fingerprint = _fingerprint(commands, sources)
                runs.append(Run(len(rows), seed, tuple(commands), folder, fingerprint, needed))
            rows.append((group, row["name"]))
    if len({run.folder for run in runs}) != len(runs):
        raise ConfigurationError(f"{path}: two rows of a group have the same name, or a seed occurs twice")
    tables = tuple(
        Table(mark, table["title"], tuple(Column(**column) for column in table["columns"]))
        for mark, table in content["tables"].items()
    )
    return Comparison(tables, tuple(rows), tuple(runs))


def _cell(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def markdown_table(
    table: Table, rows: Sequence[tuple[str, str]], results: Sequence[Sequence[Sequence[float | None]]]
) -> str:
    """One line per (group, name): mean ± standard deviation over seeds of each figure.

    Args:
        table: its title and columns.
        rows: (group, name) of each.
        results: of each row, for each seed, the figure of each column.
    """
    titles = [column.title for column in table.columns]
    lines = [f"| {table.title} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    previous = None
    for (group, name), measured in zip(rows, results, strict=True):
        if group != previous:
            lines.append(f"| **{group}** |" + " |" * len(titles))
        previous = group
        cells = [
            _cell(values, column.digits)
            for column, values in zip(table.columns, zip(*measured, strict=True), strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _insert(text: str, mark: str, path: Path) -> None:
    """Put a table between its marks in a Markdown file."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = path.read_text().partition(opening)
    _, end, after = rest.partition(closing)
    if not end:
        raise ConfigurationError(f"{path} has no place for the table: put {opening} and {closing} where it shall stand")
    path.write_text(f"{before}{opening}\n{text}\n{closing}{after}")


def _finish(comparison: Comparison, output: Path, into: Path | None) -> None:
    """Write and print the tables of runs that are done."""
    with open(output / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        titles = [f"{table.mark}/{column.title}" for table in comparison.tables for column in table.columns]
        writer.writerow(["group", "name", "seed", *titles])
        for run in comparison.runs:
            values = [column.read(run.folder) for table in comparison.tables for column in table.columns]
            writer.writerow([*comparison.rows[run.row], run.seed, *values])
    for table in comparison.tables:
        results: list[list[list[float | None]]] = [[] for _ in comparison.rows]
        for run in comparison.runs:
            results[run.row].append([column.read(run.folder) for column in table.columns])
        text = markdown_table(table, comparison.rows, results)
        (output / f"{table.mark}.md").write_text(text + "\n")
        if into:
            _insert(text, table.mark, into)
        print(f"\n{text}")


def compare(args: Sequence[str]) -> None:
    """Do the runs of a comparison and print its tables; runs that are done and unchanged are not repeated.

    Writes each table as Markdown, and ``runs.csv``, beside the runs.

    Args:
        args: words of the command line after ``compare``.

    Raises:
        ConfigurationError: a comparison file that cannot be run.
        SystemExit: with status 1 where runs failed, naming their logs.
    """
    parser = argparse.ArgumentParser(prog="calib-guidance compare", description="Many runs as tables.")
    parser.add_argument(
        "--config", type=Path, required=True, help="comparison file, e.g. lightning_configs/compare/digits.yaml"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="folder of the runs (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 4),
        help="runs at a time, the cores are shared (%(default)s)",
    )
    parser.add_argument(
        "--into", type=Path, help="Markdown file to put the tables into, between <!-- MARK --> and <!-- /MARK -->"
    )
    options = parser.parse_args(list(args))
    comparison = read_comparison(options.config, options.output)
    todo = [run for run in comparison.runs if not run.done()]
    workers = max(1, min(options.workers, len(todo) or 1))
    threads = max(1, (os.cpu_count() or 1) // workers)
    started, failed = time.monotonic(), []
    # Spawned, and without spinning threads, since the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    before = f"{len(comparison.runs) - len(todo)} runs done before"
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(todo), desc=before, unit="run") as bar,
    ):
        waiting = {run.folder: run for run in todo}
        jobs: dict[Future, Run] = {}
        while waiting or jobs:
            ready = [
                run for run in waiting.values() if run.needs not in waiting.keys() | {r.folder for r in jobs.values()}
            ]
            jobs |= {pool.submit(_work, waiting.pop(run.folder), threads): run for run in ready}
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                run = jobs.pop(job)
                bar.update()
                if error := job.exception():
                    failed.append(run)
                    tqdm.write(f"failed: {run.folder / 'log.txt'}: {error}")
                    continue
                for remark in job.result():
                    tqdm.write(f"{run.folder}: {remark}")
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(comparison.runs)} runs failed; their logs say why, and the same command does what is left"
        )
    _finish(comparison, options.output, options.into)
    print(
        f"\n{len(todo)} runs in {(time.monotonic() - started) / 60:.1f} minutes; tables and runs.csv are in {options.output}"
    )
