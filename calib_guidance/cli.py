"""The command line: ``calib-guidance fit|validate|test|predict --config FILE``, ``compare`` and ``doctor``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from calib_guidance.checkpoints import CheckpointError
from calib_guidance.compare import compare
from calib_guidance.doctor import doctor
from calib_guidance.errors import ConfigurationError
from calib_guidance.lightning_cli import run_lightning


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after ``calib-guidance``; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message, for a configuration that cannot run; with status 1 for a no-go of ``doctor``.
            With CALIB_GUIDANCE_TRACEBACK set in the environment the error itself is raised in place of status 2.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words[:1] == ["compare"]:
            compare(words[1:])
        elif words[:1] == ["doctor"]:
            doctor(words[1:])
        else:
            run_lightning(args)
    except (ConfigurationError, CheckpointError) as error:
        if os.environ.get("CALIB_GUIDANCE_TRACEBACK"):
            raise
        print(f"calib-guidance: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
