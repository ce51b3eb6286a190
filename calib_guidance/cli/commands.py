"""The commands of ``calib-guidance``: Lightning's four, and the project's own."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import platform
import select
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

import calib_guidance
from calib_guidance.backend.light_imports import defer_imports
from calib_guidance.cli.configs import check_names, check_weights, expand_bases
from calib_guidance.cli.trust import list_foreign
from calib_guidance.errors import CheckpointError, ConfigurationError, RunError, StoppedError, closest

_LIGHTNING = {
    "fit": "train a classifier or a diffusion model, calibrate it",
    "validate": "measure a classifier on held-out data",
    "test": "the same on test data",
    "predict": "make guided samples, or denoised images to train on",
}
# For each command the module with a function of its name, and what it does. Imported on demand: only those in _HEAVY need torch,
# whose import takes longer than the others do.
_COMMANDS = {
    "configs": ("cli.configs", "list the named configurations"),
    "doctor": ("cli.doctor", "check files, shapes, memory and time of a run before it"),
    "ema": ("training.ema", "average a training's weights over a length chosen afterwards"),
    "evaluate": ("evaluation.evaluate", "measure samples: FID, precision, recall, accuracy and more"),
    "experiment": ("experiments.experiment", "many runs: rows, grids and seeds, as tables and plots"),
    "export": ("runs.export", "a run's samples as npz, PNG or a data set"),
    "reference": ("evaluation.evaluate", "statistics of a reference set, for evaluate"),
    "report": ("report", "one HTML page of a run, or of several"),
    "status": ("runs.status", "what of a run is done, and how long the rest takes"),
}
_HEAVY = {"doctor", "ema", "evaluate", "experiment", "reference"}


def _overview() -> str:
    commands = _LIGHTNING | {name: text for name, (_, text) in _COMMANDS.items()}
    lines = "\n".join(f"  {name:10} {text}" for name, text in commands.items())
    end = "calib-guidance COMMAND --help lists the options of a command, calib-guidance --version the versions."
    return f"usage: calib-guidance COMMAND …\n\n{lines}\n\n{end}"


def _version() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"calib-guidance {calib_guidance.__version__} ({libraries}, Python {platform.python_version()})"


def _start(argv: Sequence[str]) -> None:
    """Run a command."""
    if argv[0] in _HEAVY:
        defer_imports()
    if argv[0] in _COMMANDS:
        list_foreign(argv[1:])
        module = importlib.import_module(f"calib_guidance.{_COMMANDS[argv[0]][0]}")
        getattr(module, argv[0])(argv[1:])
        return
    from calib_guidance.cli.lightning import run_lightning

    run_lightning(argv)


def _show_help(argv: Sequence[str]) -> None:
    """The help page of a command, remembered from the last time."""
    from calib_guidance.cli.remembered import Answer

    answer = Answer(argv, "help")
    if (page := answer.read()) is None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                _start(argv)
        except SystemExit as stop:
            if stop.code:
                raise
        page = printed.getvalue()
        answer.write(page)
    print(page, end="")


def _predict(argv: Sequence[str]) -> None:
    """Sample; or print the report where this command has finished and no file of it has changed since."""
    from calib_guidance.cli.remembered import RunAnswer

    answer = RunAnswer(argv)
    if (report := answer.read()) is not None:
        print("complete, and no file of the run has changed since: nothing to do", file=sys.stderr)
        print(report)
        return
    from calib_guidance.cli.lightning import run_lightning

    cli = run_lightning(argv)
    report = cli.model.context.report if hasattr(cli.model, "context") else ""
    if report and not any(getattr(callback, "restart", False) for callback in cli.trainer.callbacks):
        answer.write(report, cli.model.context.store.path)


def _run(argv: Sequence[str], from_shell: bool) -> None:
    if sys.platform == "win32":
        raise ConfigurationError(
            "Windows is not supported: run folders need POSIX signals and atomic links between files. Use WSL 2, Linux or macOS"
        )
    if not argv:
        raise ConfigurationError(f"which command?\n{_overview()}")
    command = argv[0]
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(_version())
    elif command not in (*_COMMANDS, *_LIGHTNING) and not command.startswith("-"):
        hint = closest(command, [*_LIGHTNING, *_COMMANDS])
        raise ConfigurationError(f"unknown command {command!r}{hint}\n{_overview()}")
    elif command in _COMMANDS and command not in _HEAVY:
        _start(argv)
    elif from_shell and argv[1:] in (["-h"], ["--help"]):
        _show_help(argv)
    elif command in _COMMANDS:
        check_names(argv)
        _start(argv)
    else:
        argv = expand_bases(argv)  # before torch is imported: a name may be misspelled, a file missing
        check_weights(argv)
        alone = not {"RANK", "SLURM_PROCID"} & os.environ.keys()  # else all processes would have to agree
        (_predict if command == "predict" and from_shell and alone else _start)(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: arguments after ``calib-guidance``; None takes those of the process.

    Raises:
        SystemExit: with a message. Status 1: a no-go of ``doctor``, or out of memory. Status 2: a configuration that cannot run.
            ``predict``: status 3 if samples failed, status 4 if it stopped early (a signal, a full disk) and can be resumed.
            ``status`` has its own. If CALIB_GUIDANCE_TRACEBACK is set in the environment, the error itself is raised instead.
    """
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv), from_shell=argv is None)
        finally:
            sys.stdout.flush()
    except (ConfigurationError, CheckpointError, RunError, OSError) as error:
        if os.environ.get("CALIB_GUIDANCE_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            raise SystemExit(128 + signal.SIGPIPE) from error
        status, text = _status_and_text(error)
        with contextlib.suppress(BrokenPipeError):
            print(f"calib-guidance: {'error: ' if status in (1, 2) else ''}{text}", file=sys.stderr)
        raise SystemExit(status) from error
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits where it is interrupted.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("calib-guidance: stopped by SIGINT", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _status_and_text(error: Exception) -> tuple[int, str]:
    if not isinstance(error, OSError) or isinstance(error, RunError):
        return error.status if isinstance(error, RunError) else 2, str(error)
    reason = "exists, and is not a folder" if error.errno == errno.EEXIST else error.strerror
    named = f"{error.filename}: {reason}" if error.filename and reason else str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return 2, named
    return StoppedError.status, f"{named}. What is complete is kept; free disk space and re-run to resume"


def _stdout_is_closed() -> bool:
    """Whether the reader of the output has gone, such as ``head``; nothing more is written then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if closed := bool(poll.poll(0)):  # an error, as nothing else is asked for
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
