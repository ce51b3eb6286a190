"""``calib-guidance doctor --config FILE``: what would go wrong in a long run, and what it costs, before it."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

from calib_guidance.cli.doctor.files import check_files, read_configuration, without_network
from calib_guidance.cli.doctor.parts import check_parts
from calib_guidance.cli.doctor.rehearsal import rehearse
from calib_guidance.cli.doctor.report import Report

__all__ = ["doctor"]


def doctor(words: Sequence[str]) -> None:
    """Examine a configuration and print what is found. Nothing is downloaded, and nothing written into the run's folders.

    Args:
        words: of the command line after ``doctor``: what ``fit`` or ``predict`` would be given.

    Raises:
        ConfigurationError: a configuration that cannot be read.
        SystemExit: with status 1 for no-go.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance doctor",
        description="What would go wrong in a long run, and what it costs: files, parts, one step. Ends with go (status 0) or "
        "no-go (1). Takes the options of fit and predict.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML file, several are merged")
    parser.parse_known_args(list(words))
    report, disabled = Report(), logging.root.manager.disable
    logging.disable(logging.INFO)  # what Lightning says of devices and seeds
    try:
        with warnings.catch_warnings(), without_network():
            warnings.simplefilter("ignore")
            cli = read_configuration(words)
            print(f"calib-guidance {cli.subcommand} with {cli.options.model.class_path.rpartition('.')[2]}")
            report.section("files")
            found = check_files(cli, report)
            report.section("parts")
            parts = check_parts(cli, found, report)
            report.section("run")
            rehearse(parts, found, report)
    finally:
        logging.disable(disabled)
    counts = report.counts
    problems = [f"{counts[mark]} {mark}" for mark in ("missing", "wrong") if counts[mark]]
    notes = f" ({counts['note']} to note)" if counts["note"] else ""
    if problems:
        print(f"\nNO-GO: {' and '.join(problems)}{notes}")
        raise SystemExit(1)
    print(f"\nGO: calib-guidance {cli.subcommand} can be started{notes}")
