"""The commands: ``calib-guidance fit|validate|test|predict --config …``, and those of the table below."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from calib_guidance.errors import CheckpointError, ConfigurationError, RunError, StoppedError

# Imported when asked for: status and export need neither torch nor Lightning, whose import takes longer than they do.
_COMMANDS = {
    "compare": "calib_guidance.compare",
    "doctor": "calib_guidance.doctor",
    "evaluate": "calib_guidance.evaluate",
    "export": "calib_guidance.export",
    "reference": "calib_guidance.reference",
    "report": "calib_guidance.report",
    "status": "calib_guidance.status",
    "sweep": "calib_guidance.sweep",
}  # modules with a function of the command's name, which takes the words after it


def _run(command: str | None, words: Sequence[str], args: Sequence[str] | None) -> None:
    if command in _COMMANDS:
        getattr(importlib.import_module(_COMMANDS[command]), command)(words)
    else:
        from calib_guidance.lightning_cli import run_lightning

        run_lightning(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after ``calib-guidance``; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message, for a configuration that cannot run; with status 1 for a no-go of ``doctor``
            and for what does not fit into the memory; of ``predict`` with status 3 where samples had to be left out, and 4 where
            it stopped early (a signal, a full disk) and the same command goes on; those of ``status``. With
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
            f"calib-guidance: {full}: what is written whole stays, make room and give the same command again",
            file=sys.stderr,
        )
        raise SystemExit(StoppedError.status) from error
