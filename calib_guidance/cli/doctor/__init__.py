"""``calib-guidance doctor --config FILE``: a dry run, which finds what would fail in a long run and measures its cost."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from calib_guidance.cli.doctor.dry_run import DryRun
from calib_guidance.cli.parsed import quietly, read_configuration, without_network

__all__ = ["doctor"]


def doctor(argv: Sequence[str]) -> None:
    """Check a configuration and print the findings. Nothing is downloaded, and nothing is written to the run's folders.

    ``argv`` is that of ``fit`` or ``predict``. Exits with status 1 for no-go.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance doctor",
        description="Dry run: checks files and parts, runs one batch, and measures memory and time. Ends with go (status 0) or "
        "no-go (status 1). Takes the options of fit and predict.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML file; several are merged")
    parser.parse_known_args(list(argv))
    with quietly(logging.WARNING), without_network():
        cli = read_configuration(argv)
        print(f"calib-guidance {cli.subcommand} with {cli.options.model.class_path.rpartition('.')[2]}")
        dry_run = DryRun(cli)
        for title, stage in (("files", dry_run.check_files), ("parts", dry_run.build), ("run", dry_run.run)):
            print(f"\n{title}")
            stage()
    counts = dry_run.counts
    problems = [f"{counts[mark]} {mark}" for mark in ("missing", "wrong") if counts[mark]]
    notes = f" ({counts['note']} {'note' if counts['note'] == 1 else 'notes'})" if counts["note"] else ""
    if problems:
        print(f"\nNO-GO: {' and '.join(problems)}{notes}")
        raise SystemExit(1)
    print(f"\nGO: calib-guidance {cli.subcommand} can be started{notes}")
