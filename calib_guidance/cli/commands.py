"""The commands of ``calib-guidance``: Lightning's four, and the project's own."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import select
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import calib_guidance
from calib_guidance.backend.atomic import write_text
from calib_guidance.backend.light_imports import collecting_later, defer_imports
from calib_guidance.backend.shipped import find_file
from calib_guidance.backend.text import parse_yaml
from calib_guidance.cli import measure_options
from calib_guidance.cli.configs import check_weights, expand_bases, list_foreign, named_texts
from calib_guidance.errors import CheckpointError, ConfigurationError, RunError, StoppedError, closest

# For each command the module with a function of its name, and what it does. Imported on demand: only those in _HEAVY need torch,
# whose import takes longer than the others do.
_COMMANDS = {
    "fit": ("cli.lightning", "train a classifier or a diffusion model, calibrate it"),
    "validate": ("cli.lightning", "measure a classifier on held-out data"),
    "test": ("cli.lightning", "the same on test data"),
    "predict": ("cli.lightning", "make guided samples, or denoised images to train on"),
    "app": ("app", "a page in the browser to try out guidance"),
    "compare-runs": ("evaluation.compare", "is one run better than another, or is it the noise"),
    "configs": ("cli.configs", "list the named configurations"),
    "doctor": ("cli.doctor", "check files, shapes, memory and time of a run before it"),
    "ema": ("training.ema", "average a training's weights over a length chosen afterwards"),
    "evaluate": ("evaluation.evaluate", "measure samples: FID, precision, recall, accuracy and more"),
    "experiment": ("experiments.experiment", "many runs: rows, grids and seeds, as tables and plots"),
    "export": ("runs.export", "a run's samples as npz, PNG or a data set"),
    "reference": ("evaluation.evaluate", "statistics of a reference set, for evaluate"),
    "report": ("report", "one HTML page of a run, or of several"),
    "tune": ("experiments.tune", "the best scale and parameters of every method, under an equal budget"),
    "status": ("runs.status", "what of a run is done, and how long the rest takes"),
}
_LIGHTNING = {"fit", "validate", "test", "predict"}
_MEASURING = {"compare-runs", "evaluate", "reference"}
_HEAVY = _LIGHTNING | _MEASURING | {"app", "doctor", "ema", "experiment", "tune"}
_LINES = "\n".join(f"  {name:12} {text}" for name, (_, text) in _COMMANDS.items())
_END = "calib-guidance COMMAND --help lists the options of a command, calib-guidance --version the versions."
_OVERVIEW = f"usage: calib-guidance COMMAND …\n\n{_LINES}\n\n{_END}"


def _start(argv: Sequence[str], own_process: bool = False) -> Any:
    """Run a command; ``own_process`` says that a shell started it."""
    if argv[0] not in _LIGHTNING and argv[0] in _COMMANDS:
        list_foreign(argv[1:])
    name, arguments = argv[0].replace("-", "_"), argv[1:]
    if argv[0] in _MEASURING:  # before torch is imported
        arguments = getattr(measure_options, name)(arguments)
        measure_options.check_files(arguments)
    if argv[0] in _HEAVY:
        defer_imports()
    path = f"calib_guidance.{_COMMANDS.get(argv[0], _COMMANDS['fit'])[0]}"
    if path not in sys.modules:
        with collecting_later():
            importlib.import_module(path)
        gc.freeze()  # what was imported stays, and need not be looked at
        atexit.register(gc.unfreeze)  # libraries complain of what is not collected in the end
    module = importlib.import_module(path)
    if argv[0] not in _COMMANDS or argv[0] in _LIGHTNING:
        return module.run_lightning(argv, own_process=own_process)
    return getattr(module, name)(arguments)


# What a command answers again without any import: help pages, and the report of a run that is complete and unchanged. Answers
# lie in the user's cache folder.
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("jsonargparse", "lightning", "numpy", "torch")
_MOST = 10_000  # files of a folder; more take as long to look at as the run takes to start


def _stamps(path: Path) -> list[list[Any]] | None:
    """Name, size and time of change of a file, or of all files in a folder; None where they are too many."""
    try:
        found = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
        files = sorted(itertools.islice(found, _MOST + 1))
        states = [file.stat() for file in files]
    except OSError:
        return None
    stamps = [[str(file), state.st_size, state.st_mtime_ns] for file, state in zip(files, states, strict=True)]
    return stamps if len(stamps) <= _MOST else None


def _read_files(argv: Sequence[str]) -> set[Path]:
    """Files and folders that the arguments and configurations of a command name."""
    values = (argument.partition("=")[2] or argument for argument in argv)
    nodes = [parse_yaml(value) if "\n" in value else value for value in values]
    found = set()
    for _, text in named_texts(nodes):
        with contextlib.suppress(OSError, RuntimeError):  # too long for a name; ~ of nobody
            if text and "\n" not in text and (path := find_file(Path(text).expanduser())).exists():
                found.add(path.absolute())
    return found


class Answer:
    """What was printed for a command line, if it still holds.

    It is of one state of the package and, of the kind ``run``, of every file that the command read or wrote; where anything
    differs the command runs as if there were none.
    """

    def __init__(self, argv: Sequence[str], kind: str):
        libraries = [find_spec(name) for name in _LIBRARIES]
        code = [*(Path(spec.origin) for spec in libraries if spec), *sorted(_PACKAGE.rglob("*.py"))]
        columns = shutil.get_terminal_size().columns
        key = [kind, list(argv), os.getcwd(), columns if kind == "help" else 0, [_stamps(path) for path in code]]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(root, "calib_guidance", f"{kind}-{name}.json")
        self._before = {path: _stamps(path) for path in (_read_files(argv) if kind == "run" else ())}

    def read(self) -> str | None:
        """The text; None where there is none, or where a file has changed since."""
        try:
            answer = json.loads(self.path.read_text())
            same = all(_stamps(Path(root)) == stamps for root, stamps in answer["roots"].items())
            return answer["text"] if same else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, text: str, folder: Path | None = None) -> None:
        """Keep a text for as long as what the command read, and the folder that it wrote, stay as they are."""
        written = {} if folder is None else {folder.absolute(): _stamps(folder.absolute())}
        read = {path: before for path, before in self._before.items() if path not in written}
        roots = {str(path): stamps for path, stamps in (read | written).items()}
        if None in roots.values() or any(_stamps(path) != before for path, before in read.items()):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"text": text, "roots": roots}))
        except OSError:  # no home or no space: the next call takes as long as this one
            return


def _show_help(argv: Sequence[str]) -> None:
    """The help page of a command, remembered from the last time."""
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
    answer = Answer(argv, "run")
    if (report := answer.read()) is not None:
        print("complete, and no file of the run has changed since: nothing to do", file=sys.stderr)
        print(report)
        return
    cli = _start(argv, own_process=True)
    report = cli.model.context.report if hasattr(cli.model, "context") else ""
    if report and not any(getattr(callback, "restart", False) for callback in cli.trainer.callbacks):
        answer.write(report, cli.model.context.store.path)


def _run(argv: Sequence[str], from_shell: bool) -> None:
    if sys.platform == "win32":
        raise ConfigurationError(
            "Windows is not supported: run folders need POSIX signals and atomic links between files. Use WSL 2, Linux or macOS"
        )
    if not argv:
        raise ConfigurationError(f"which command?\n{_OVERVIEW}")
    command = argv[0]
    if command in ("-h", "--help"):
        print(_OVERVIEW)
    elif command == "--version":
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
        print(f"calib-guidance {calib_guidance.__version__} ({libraries}, Python {platform.python_version()})")
    elif command not in _COMMANDS and not command.startswith("-"):
        raise ConfigurationError(f"unknown command {command!r}{closest(command, _COMMANDS)}\n{_OVERVIEW}")
    elif command in _COMMANDS and command not in _HEAVY:
        _start(argv)
    elif from_shell and argv[1:] in (["-h"], ["--help"]):
        _show_help(argv)
    else:
        expanded = expand_bases(argv)  # before torch is imported: a name may be misspelled, a file missing
        if command in _HEAVY - _LIGHTNING:
            return _start(argv)
        check_weights(expanded)
        alone = not {"RANK", "SLURM_PROCID"} & os.environ.keys()  # else all processes would have to agree
        (_predict if command == "predict" and from_shell and alone else _start)(expanded)


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
