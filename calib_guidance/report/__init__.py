"""``calib-guidance report RUN [RUN …]``: one self-contained HTML page of one or several sampling runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from calib_guidance.backend.atomic import write_text
from calib_guidance.errors import ConfigurationError
from calib_guidance.report.runs import open_runs

__all__ = ["report"]


def _make_folder(path: Path, option: str) -> None:
    """Raise ConfigurationError where nothing can be written, before anything is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{option}: {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigurationError(f"{option}: {path} is not writable; name another place")


def report(args: Sequence[str]) -> None:
    """``calib-guidance report``, of the arguments after ``report``: see its ``--help``."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance report",
        description="One HTML page of one or several sampling runs: settings, metrics, samples. It needs no network; missing "
        "or damaged parts are skipped and listed.",
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
    parser.add_argument("--plots", type=Path, help="folder to keep the page's plots in, each as PNG and PDF")
    options = parser.parse_args(list(args))
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    output: Path = options.output or folder / "report.html"
    runs = open_runs(options.runs)
    if output.is_dir():
        raise ConfigurationError(f"--output: {output} is a folder; name the file, such as {output / 'report.html'}")
    _make_folder(output.parent, "--output")
    if options.plots:
        _make_folder(options.plots, "--plots")
    # After what can be refused at once: importing torch and matplotlib takes seconds.
    from calib_guidance.report.page import render

    with contextlib.ExitStack() as stack:
        page = render(runs, options.plots or Path(stack.enter_context(tempfile.TemporaryDirectory())))
    write_text(output, page)
    for run in runs:
        for remark in run.remarks:
            print(f"{run.name}: {remark}")
    if options.plots:
        print(f"wrote {len(list(options.plots.glob('*.pdf')))} plots, as PNG and PDF, to {options.plots}")
    print(f"wrote {output} ({len(page.encode()) / 1e6:.1f} MB)")
