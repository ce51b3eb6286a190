"""The commands: ``calib-guidance fit|validate|test|predict --config …``, ``compare``, ``doctor``, ``status`` and ``export``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from calib_guidance.errors import CheckpointError, ConfigurationError


def _run(command: str | None, words: Sequence[str], args: Sequence[str] | None) -> None:
    # Imported when asked for: status and export need neither torch nor Lightning, whose import takes longer than they do.
    if command == "status":
        from calib_guidance.status import status

        status(words)
    elif command == "export":
        from calib_guidance.export import export

        export(words)
    elif command == "compare":
        from calib_guidance.compare import compare

        compare(words)
    elif command == "doctor":
        from calib_guidance.doctor import doctor

        doctor(words)
    else:
        from calib_guidance.lightning_cli import run_lightning

        run_lightning(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after ``calib-guidance``; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message, for a configuration that cannot run; with status 1 for a no-go of ``doctor``,
            and those of ``status``. With CALIB_GUIDANCE_TRACEBACK set in the environment the error itself is raised in place
            of status 2.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        _run(words[0] if words else None, words[1:], args)
    except (ConfigurationError, CheckpointError) as error:
        if os.environ.get("CALIB_GUIDANCE_TRACEBACK"):
            raise
        print(f"calib-guidance: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
