"""``calib-guidance compare --config FILE``: many runs, several seeds each, as tables."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calib_guidance.cli.configs import expand_bases
from calib_guidance.errors import ConfigurationError
from calib_guidance.experiments.runner import OVERLAYS, QUIET, Run, cell, check_keys, do_runs, slug, sources

_ROW_KEYS = {"name", "overlays", "arguments", "groups", "needs", "commands"}
_STAGE_KEYS = {"command", "configs", "arguments"}
_COLUMN_KEYS = {"title", "file", "key", "digits"}
_KEYS = {"stages": dict, "seeds": list, "tables": dict, "groups": dict, "rows": list}
_COMMANDS = ("fit", "validate", "test", "predict")


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


def _fingerprint(commands: Sequence[Sequence[str]], code: bytes) -> str:
    """Hash of the words, the configurations and the weights that they name, and the package's own sources."""
    digest = hashlib.sha256(json.dumps(commands).encode() + code)
    words = [word for command in commands for word in command]
    configs = [Path(word) for word in words if "\n" not in word and Path(word).is_file()]
    texts = [*words, *(config.read_text() for config in configs)]
    weights = sorted({w for text in texts for w in re.findall(r"[\w./-]+\.(?:safetensors|pth?|ckpt)", text)})
    for path in (*configs, *map(Path, weights)):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _expect(value: object, kind: type, where: str) -> Any:
    """The value; ConfigurationError where it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        name = {dict: "a mapping", list: "a list", int: "a whole number", str: "a text"}[kind]
        raise ConfigurationError(f"{where} must be {name}, got {value!r}")
    return value


def _for_stage(words: object, stage: str, where: str) -> list[str]:
    """Overlays or arguments for one stage: of all stages where they are a list."""
    words = words.get(stage) if isinstance(words, Mapping) else words
    return [_expect(word, str, where) for word in _expect([] if words is None else words, list, where)]


def _fill(text: str, known: Mapping[str, object], where: str) -> str:
    for place, value in known.items():
        text = text.replace(place, str(value))
    if unknown := re.search(r"\{\w+\}", text):
        raise ConfigurationError(f"{where}: unknown {unknown[0]} in {text!r}; known: {', '.join(known)}")
    return text


def _read(path: Path) -> dict[str, Any]:
    """What the file says, with its parts of the kinds that they must be."""
    if not path.is_file():
        raise ConfigurationError(f"compare: no such file: {path}")
    try:
        content = _expect(yaml.safe_load(path.read_text()), dict, str(path))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {error}") from error
    check_keys(content, _KEYS, str(path))
    if missing := _KEYS.keys() - content.keys():
        raise ConfigurationError(f"{path}: missing keys {sorted(missing)}")
    for key, kind in _KEYS.items():
        _expect(content[key], kind, f"{path}, {key}")
    for seed in content["seeds"]:
        _expect(seed, int, f"{path}, a seed")
    for name, stage in content["stages"].items():
        where = f"{path}, stage {name!r}"
        check_keys(_expect(stage, dict, where), _STAGE_KEYS, where)
    for number, row in enumerate(content["rows"], 1):
        where = f"{path}, row {number}"
        check_keys(_expect(row, dict, where), _ROW_KEYS, where)
        _expect(row.get("name"), str, f"{where}: name")
    commands = [stage.get("command") for stage in content["stages"].values()]
    commands += [command for row in content["rows"] for command in row.get("commands", {}).values()]
    if wrong := [command for command in commands if command not in _COMMANDS]:
        raise ConfigurationError(f"{path}: unknown command {wrong[0]!r}; known: {', '.join(_COMMANDS)}")
    return content


def _read_tables(content: Mapping[str, Any], where: str) -> tuple[Table, ...]:
    tables = []
    for mark, table in content.items():
        check_keys(_expect(table, dict, f"{where}, table {mark!r}"), {"title", "columns"}, f"{where}, table {mark!r}")
        columns = []
        for column in _expect(table.get("columns"), list, f"{where}, columns of table {mark!r}"):
            check_keys(
                _expect(column, dict, f"{where}, a column of {mark!r}"), _COLUMN_KEYS, f"{where}, a column of {mark!r}"
            )
            for key in ("title", "file", "key"):
                _expect(column.get(key), str, f"{where}, {key} of a column of {mark!r}")
            _expect(column.get("digits", 0), int, f"{where}, digits of column {column['title']!r}")
            columns.append(Column(**column))
        tables.append(
            Table(mark, _expect(table.get("title"), str, f"{where}, title of table {mark!r}"), tuple(columns))
        )
    return tuple(tables)


def read_comparison(path: Path, output: Path) -> Comparison:
    """A comparison file.

    It has the keys ``stages`` (the commands of a run, one after the other: ``command``, ``configs``, ``arguments``), ``seeds``,
    ``tables`` (by mark: ``title`` and ``columns``), ``groups`` (name to overlays, applied first) and ``rows`` (``name``,
    ``overlays``, and optionally ``arguments``, the ``groups`` that the row is for, ``commands``, which take the place of
    stages' own, and ``needs``, the name of a row above that must be done before). Overlays are files of lightning_configs/,
    without the ending. Overlays and arguments are a list for all stages, or a mapping of stages to lists. In arguments
    ``{seed}`` and ``{folder}`` stand for those of the run, ``{needed}`` for the folder of the needed row's run of that seed.

    Raises:
        ConfigurationError: no such file, values of another kind, unknown or missing keys, unknown places in arguments, missing
            overlays or no such row above.
    """
    content = _read(path)
    tables = _read_tables(content["tables"], str(path))
    code = sources()
    rows: list[tuple[str, str]] = []
    runs = []
    for group, group_overlays in content["groups"].items():
        for row in content["rows"]:
            where = f"{path}, row {row['name']!r}"
            if group not in row.get("groups", [group]):
                continue
            for seed in content["seeds"]:
                folder = output / slug(group) / slug(row["name"]) / f"seed{seed}"
                needed = None
                if "needs" in row:
                    needed = output / slug(group) / slug(row["needs"]) / f"seed{seed}"
                    if (group, row["needs"]) not in rows:
                        raise ConfigurationError(f"{where}: needs {row['needs']!r}, which no row above is")
                commands = []
                for stage, settings in content["stages"].items():
                    names = _for_stage(group_overlays, stage, f"{path}, overlays of group {group!r}")
                    names += _for_stage(row.get("overlays"), stage, f"{where}: overlays")
                    configs = [*_for_stage(settings.get("configs"), stage, f"{path}, configs of stage {stage!r}")]
                    configs = [*configs, *(str(OVERLAYS / f"{name}.yaml") for name in names)]
                    if missing := [c for c in configs if not Path(c).is_file()]:
                        raise ConfigurationError(f"{where}: no such files: {', '.join(missing)}")
                    arguments = _for_stage(settings.get("arguments"), stage, f"{path}, arguments of stage {stage!r}")
                    arguments += _for_stage(row.get("arguments"), stage, f"{where}: arguments")
                    command = row.get("commands", {}).get(stage, settings["command"])
                    words = [command, *(word for config in configs for word in ("--config", config))]
                    known = {"{seed}": seed, "{folder}": folder} | ({"{needed}": needed} if needed else {})
                    words += [_fill(argument, known, where) for argument in arguments]
                    commands.append((*expand_bases(words), *QUIET))
                fingerprint = _fingerprint(commands, code)
                runs.append(Run(len(rows), seed, tuple(commands), folder, fingerprint, needed))
            rows.append((group, row["name"]))
    if len({run.folder for run in runs}) != len(runs):
        raise ConfigurationError(f"{path}: two rows of a group have the same name, or a seed occurs twice")
    return Comparison(tables, tuple(rows), tuple(runs))


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
            cell(values, column.digits)
            for column, values in zip(table.columns, zip(*measured, strict=True), strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(text: str, mark: str, path: Path) -> None:
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
            insert(text, table.mark, into)
        print(f"\n{text}")
        for column in table.columns:
            if all(column.read(run.folder) is None for run in comparison.runs):
                print(f"note: no run has {column.key} in its {column.file}, which column {column.title!r} is of")


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
    started = time.monotonic()
    before = f"{len(comparison.runs) - len(todo)} runs done before"
    failed = do_runs(todo, options.workers, before=before)
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(comparison.runs)} runs failed; their logs say why, and the same command does what is left"
        )
    _finish(comparison, options.output, options.into)
    print(
        f"\n{len(todo)} runs in {(time.monotonic() - started) / 60:.1f} minutes; tables and runs.csv are in {options.output}"
    )
