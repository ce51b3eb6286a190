"""``calib-guidance compare --config FILE``: many sampling runs, several seeds each, as one table."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from calib_guidance.errors import ConfigurationError
from calib_guidance.lightning_cli import run_lightning

_OVERLAYS = Path("lightning_configs")
_COLUMNS = {
    "frechet_distance": ("Fréchet ↓", 2),
    "precision": ("precision ↑", 3),
    "recall": ("recall ↑", 3),
    "judge_accuracy": ("accuracy ↑", 3),
    "integral_ece": ("integral ECE ↓", 3),
}
_MARKS = ("<!-- comparison -->", "<!-- /comparison -->")
_KEYS = {"configs", "arguments", "seeds", "groups", "rows"}
_ROW_KEYS = {"name", "overlays", "arguments", "groups"}


@dataclass(frozen=True)
class Run:
    """One sampling run of a comparison.

    Attributes:
        row: index of its row.
        seed: of its samples.
        arguments: words for the command line.
        folder: where it writes.
        fingerprint: hash of all that changes its result.
    """

    row: int
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    fingerprint: str

    def result(self) -> dict[str, Any] | None:
        """What an earlier run with the same fingerprint measured."""
        path, mark = self.folder / "metrics.json", self.folder / "fingerprint"
        if path.is_file() and mark.is_file() and mark.read_text() == self.fingerprint:
            return json.loads(path.read_text())
        return None


def _fingerprint(arguments: Sequence[str], sources: bytes) -> str:
    """Hash of the arguments, the configurations and the weights that they name, and the package's own sources."""
    digest = hashlib.sha256(json.dumps(arguments).encode() + sources)
    configs = [Path(a) for a in arguments if a.endswith(".yaml")]
    weights = sorted({w for c in configs for w in re.findall(r"[\w./-]+\.(?:safetensors|pth?|ckpt)", c.read_text())})
    for path in (*configs, *map(Path, weights)):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _work(run: Run, threads: int) -> None:
    """Sample one run in a worker process, its output in a file beside the samples."""
    torch.set_num_threads(threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "fingerprint").unlink(missing_ok=True)
    with open(run.folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_lightning(run.arguments)
    (run.folder / "fingerprint").write_text(run.fingerprint)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_comparison(path: Path, output: Path) -> tuple[list[tuple[str, str]], list[Run]]:
    """Rows, as (group, name), and runs of a comparison file.

    The file has the keys ``configs`` (base configurations), ``arguments`` (further words for ``predict``), ``seeds``,
    ``groups`` (name to overlays, applied first) and ``rows`` (``name``, ``overlays``, and optionally ``arguments`` and the
    ``groups`` that the row is for). Overlays are files of lightning_configs/, without the ending.

    Raises:
        ConfigurationError: no such file, unknown keys or missing overlays.
    """
    if not path.is_file():
        raise ConfigurationError(f"compare: no such file: {path}")
    content = yaml.safe_load(path.read_text())
    if unknown := content.keys() - _KEYS:
        raise ConfigurationError(f"{path}: unknown keys {sorted(unknown)}; known: {sorted(_KEYS)}")
    # A change of the code may change the samples, so it makes old runs stale.
    sources = b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.rglob("*.py")))
    rows: list[tuple[str, str]] = []
    runs = []
    for group, group_overlays in content["groups"].items():
        for row in content["rows"]:
            if unknown := row.keys() - _ROW_KEYS:
                raise ConfigurationError(f"{path}: row with unknown keys {sorted(unknown)}; known: {sorted(_ROW_KEYS)}")
            if group not in row.get("groups", [group]):
                continue
            overlays = [str(_OVERLAYS / f"{name}.yaml") for name in (*group_overlays, *row.get("overlays", []))]
            configs = [*content["configs"], *overlays]
            if missing := [c for c in configs if not Path(c).is_file()]:
                raise ConfigurationError(f"{path}, row {row['name']!r}: no such files: {', '.join(missing)}")
            for seed in content["seeds"]:
                folder = output / _slug(group) / _slug(row["name"]) / f"seed{seed}"
                arguments = ["predict", *(a for c in configs for a in ("--config", c))]
                arguments += [*content.get("arguments", []), *row.get("arguments", [])]
                arguments += [f"--data.init_args.seed={seed}", f"--trainer.default_root_dir={folder}"]
                arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
                runs.append(Run(len(rows), seed, tuple(arguments), folder, _fingerprint(arguments, sources)))
            rows.append((group, row["name"]))
    if len({run.folder for run in runs}) != len(runs):
        raise ConfigurationError(f"{path}: two rows of a group have the same name, or a seed occurs twice")
    return rows, runs


def _cell(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def markdown_table(rows: Sequence[tuple[str, str]], results: Sequence[Sequence[dict[str, Any]]]) -> str:
    """One line per (group, name): mean ± standard deviation over its seeds of each figure."""
    titles = [title for title, _ in _COLUMNS.values()]
    lines = [f"| guidance | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    previous = None
    for (group, name), measured in zip(rows, results, strict=True):
        if group != previous:
            lines.append(f"| **{group}** |" + " |" * len(titles))
        previous = group
        cells = [_cell([m.get(key) for m in measured], digits) for key, (_, digits) in _COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _insert(table: str, path: Path) -> None:
    """Put the table between the marks of a Markdown file."""
    before, _, rest = path.read_text().partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if not end:
        raise ConfigurationError(
            f"{path} has no place for the table: put {_MARKS[0]} and {_MARKS[1]} where it shall stand"
        )
    path.write_text(f"{before}{_MARKS[0]}\n{table}\n{_MARKS[1]}{after}")


def compare(args: Sequence[str]) -> None:
    """Run a comparison and print its table; runs that are done and unchanged are not repeated.

    Writes ``table.md`` and ``runs.csv`` beside the runs.

    Args:
        args: words of the command line after ``compare``.

    Raises:
        ConfigurationError: a comparison file that cannot be run.
        SystemExit: with status 1 where runs failed, naming their logs.
    """
    parser = argparse.ArgumentParser(prog="calib-guidance compare", description="Many sampling runs as one table.")
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
        "--into", type=Path, help=f"Markdown file to put the table into, between {' and '.join(_MARKS)}"
    )
    options = parser.parse_args(list(args))
    rows, runs = read_comparison(options.config, options.output)
    todo = [run for run in runs if run.result() is None]
    workers = max(1, min(options.workers, len(todo) or 1))
    threads = max(1, (os.cpu_count() or 1) // workers)
    started, failed = time.monotonic(), []
    # Spawned, and without spinning threads, since the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_work, run, threads): run for run in todo}
        for job in tqdm(
            as_completed(jobs), total=len(todo), desc=f"{len(runs) - len(todo)} runs done before", unit="run"
        ):
            if error := job.exception():
                failed.append(jobs[job])
                tqdm.write(f"failed: {jobs[job].folder / 'log.txt'}: {error}")
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(runs)} runs failed; their logs say why, and the same command does what is left"
        )
    results: list[list[dict[str, Any]]] = [[] for _ in rows]
    with open(options.output / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "name", "seed", *_COLUMNS, "seconds_per_image"])
        for run in runs:
            result = run.result()
            results[run.row].append(result)
            writer.writerow([*rows[run.row], run.seed, *(result.get(k) for k in (*_COLUMNS, "seconds_per_image"))])
    table = markdown_table(rows, results)
    (options.output / "table.md").write_text(table + "\n")
    if options.into:
        _insert(table, options.into)
    print(f"\n{table}\n\n{len(todo)} runs in {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"wrote {options.output / 'table.md'} and {options.output / 'runs.csv'}")
