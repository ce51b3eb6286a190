"""The commands of ``calib-guidance``: Lightning's four, and those of the second table below."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from calib_guidance.errors import CheckpointError, ConfigurationError, RunError, StoppedError

_LIGHTNING = {
    "fit": "train a classifier or a diffusion model, calibrate it",
    "validate": "measure a classifier on held-out data",
    "test": "the same on test data",
    "predict": "make guided samples, or denoised images to train on",
}
# The module with a function of the command's name, which takes the arguments after it, and what it does. Imported on demand:
# status and export need neither torch nor Lightning, whose import takes longer than they do.
_COMMANDS = {
    "compare": ("experiments.compare", "many runs and seeds, as tables"),
    "doctor": ("cli.doctor", "check files, shapes, memory and time of a run before it"),
    "evaluate": ("evaluation.evaluate", "measure samples: FID, precision, recall, accuracy and more"),
    "export": ("runs.export", "a run's samples as npz, PNG or a data set"),
    "reference": ("evaluation.reference", "statistics of a reference set, for evaluate"),
    "report": ("report", "one HTML page of a run, or of several"),
    "status": ("runs.status", "what of a run is done, and how long the rest takes"),
    "sweep": ("experiments.sweep", "values over configuration keys, a run for each"),
}


def _overview() -> str:
    lines = [
        f"  {name:10} {what}"
        for name, what in (_LIGHTNING | {name: text for name, (_, text) in _COMMANDS.items()}).items()
    ]
    return "\n".join(
        ("usage: calib-guidance COMMAND …", "", *lines, "", "calib-guidance COMMAND --help has the options of each.")
    )


def _run(command: str | None, words: Sequence[str], args: Sequence[str] | None) -> None:
    if command is None:
        raise ConfigurationError(f"which command?\n{_overview()}")
    if command in ("-h", "--help"):
        print(_overview())
    elif command in _COMMANDS:
        getattr(importlib.import_module(f"calib_guidance.{_COMMANDS[command][0]}"), command)(words)
    elif command in _LIGHTNING or command.startswith("-"):
        from calib_guidance.cli.lightning import run_lightning

        run_lightning(args)
    else:
        near = difflib.get_close_matches(command, [*_LIGHTNING, *_COMMANDS], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"unknown command {command!r}{hint}\n{_overview()}")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after ``calib-guidance``; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message, for a configuration that cannot run; with status 1 for a no-go of ``doctor``
            and for what does not fit into the memory; of ``predict`` with status 3 if samples failed, and 4 if it
            stopped early (a signal, a full disk); re-run to resume; those of ``status``. With
            CALIB_GUIDANCE_TRACEBACK set in the environment the error itself is raised instead.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        _run(words[0] if words else None, words[1:], args)
    except (ConfigurationError, CheckpointError, RunError) as error:
        if os.environ.get("CALIB_GUIDANCE_TRACEBACK"):
            raise
        status = error.status if isinstance(error, RunError) else 2
        print(f"calib-guidance: {'error: ' if status in (1, 2) else ''}{error}", file=sys.stderr)
        raise SystemExit(status) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = f"no space is left on the device, or the quota is used up ({error.filename or error})"
        print(
            f"calib-guidance: {full}: complete shards are kept; free disk space and re-run to resume",
            file=sys.stderr,
        )
        raise SystemExit(StoppedError.status) from error
