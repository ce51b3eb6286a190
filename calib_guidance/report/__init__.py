"""``calib-guidance report RUN [RUN …]``: one self-contained HTML page of one or several sampling runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from calib_guidance.errors import ConfigurationError
from calib_guidance.report.runs import open_runs

__all__ = ["report"]


def _check_output(path: Path) -> None:
    """Raise ConfigurationError where the page cannot be written, before it is made."""
    if path.is_dir():
        raise ConfigurationError(f"--output: {path} is a folder; name the file, such as {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output: {path.parent} cannot be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigurationError(f"--output: {path.parent} is not writable; name another place")


def report(args: Sequence[str]) -> None:
    """``calib-guidance report``: see its ``--help``.

    Args:
        args: the words after ``report``.

    Raises:
        ConfigurationError: a folder that is no run or is given twice, or a page that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance report",
        description="One HTML page of one or several sampling runs: settings, figures, samples. It needs no network; what is "
        "missing or damaged is left out, and said.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run (trainer.default_root_dir); several are compared with the first",
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (report.html, in the run's folder where there is one run)"
    )
    options = parser.parse_args(list(args))
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    output: Path = options.output or folder / "report.html"
    runs = open_runs(options.runs)
    _check_output(output)
    # After what can be refused at once: importing torch and matplotlib takes seconds.
    from calib_guidance.report.page import render

    page = render(runs)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    for run in runs:
        for remark in run.remarks:
            print(f"{run.name}: {remark}")
    print(f"wrote {output} ({len(page.encode()) / 1e6:.1f} MB)")
