"""``calib-guidance report RUN [RUN …]``: one self-contained HTML page of one or several sampling runs."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from calib_guidance.backend.atomic import check_writable, write_text
from calib_guidance.errors import ConfigurationError, RunError
from calib_guidance.report.runs import open_runs
from calib_guidance.runs.export import read_class_names

__all__ = ["report"]


def report(args: Sequence[str]) -> None:
    """``calib-guidance report``, of the arguments after ``report``: see its ``--help``."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance report",
        description="One HTML page of one or several sampling runs: settings, metrics, samples. It needs no network; missing "
        "or damaged parts are skipped and listed.",
    )
    runs = "folder of a run (trainer.default_root_dir); several are compared with the first"
    add = functools.partial(parser.add_argument, type=Path)
    add("runs", nargs="+", metavar="RUN", help=runs)
    add("--output", help="file to write (report.html, in the run's folder where there is one run)")
    add("--names", metavar="FILE", help="names of the classes, one per line, in order")
    add("--plots", help="folder to keep the page's plots in, each as PNG and PDF")
    options = parser.parse_args(list(args))
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    output: Path = options.output or folder / "report.html"
    runs = open_runs(options.runs, dict(enumerate(read_class_names(options.names) or ())))
    if output.is_dir():
        raise ConfigurationError(f"--output: {output} is a folder; name the file, such as {output / 'report.html'}")
    check_writable(output.parent, "--output")
    if options.plots:
        check_writable(options.plots, "--plots")
    # After what can be refused at once: importing torch and matplotlib takes seconds.
    from calib_guidance.report.page import render

    try:
        with tempfile.TemporaryDirectory() as temporary:
            page = render(runs, options.plots or Path(temporary))
        write_text(output, page)
    except OSError as error:
        where = error.filename or output
        raise RunError(f"{where} cannot be written: {error.strerror or error}. Free space and re-run") from error
    for run in runs:
        for remark in run.remarks:
            print(f"{run.name}: {remark}")
    if options.plots:
        print(f"wrote {len(list(options.plots.glob('*.pdf')))} plots, as PNG and PDF, to {options.plots}")
    print(f"wrote {output} ({len(page.encode()) / 1e6:.1f} MB)")
