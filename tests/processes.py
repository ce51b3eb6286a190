"""Commands in processes of their own, forked off one that has imported everything: an import takes longer than most of them."""

import atexit
import contextlib
import functools
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        statuses: exit status of each process, negative for a signal, None for one that did not end in time.
        output: what they printed, on both streams.
    """

    statuses: list[int | None]
    output: str


def run(*argv, ranks=None, seconds=280, environment=(), function=None):
    """Run a command of calib-guidance in the repository's root, in one process or in several ranks as torchrun starts them.

    With ``function``, ``MODULE:NAME``, each process calls that in its place, with its rank and the arguments.
    """
    with tempfile.NamedTemporaryFile() as output:
        request = {
            "argv": [str(word) for word in argv],
            "ranks": ranks,
            "seconds": seconds,
            "output": output.name,
            "function": function,
        }
        server = _server()
        server.stdin.write(json.dumps(request | {"environment": {**os.environ, **dict(environment)}}) + "\n")
        server.stdin.flush()
        return Done(json.loads(server.stdout.readline()), Path(output.name).read_text(errors="replace"))


def succeed(*argv, ranks=None, **options):
    """The same; fails where a process does."""
    done = run(*argv, ranks=ranks, **options)
    assert done.statuses == [0] * (ranks or 1), done.output[-3000:]


def torchrun(rank, *argv):
    """``torchrun ARGV``, with workers that are forked off this process. To be given as ``function``."""
    from torch.distributed import run as launcher

    read = launcher.config_from_args

    def in_forks(arguments):
        return read(arguments)[0], _worker, arguments.training_script_args

    launcher.config_from_args = in_forks
    launcher.main(["--start-method=fork", *argv])


def _worker(*argv):
    from calib_guidance.cli import main

    main(list(argv))


@functools.cache
def _server():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-m", "tests.processes"], cwd=ROOT, env=environment, **pipes)
    atexit.register(server.kill)
    return server


def _fork(argv, environment, output, function):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.clear()
        os.environ |= environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["calib-guidance"]
        if function is None:
            main(argv)
        else:
            pkgutil.resolve_name(function)(int(environment.get("RANK", 0)), *argv)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _answer(argv, ranks, seconds, output, environment, function):
    """Exit statuses of a request's processes."""
    each = [{}]
    if ranks is not None:
        shared = {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    found = {_fork(argv, environment | more, output, function): None for more in each}
    end = time.monotonic() + seconds
    while None in found.values() and time.monotonic() < end:
        for pid in [p for p, status in found.items() if status is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in [p for p, status in found.items() if status is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(found.values())


def _warm_up(kept):
    """Imports what commands import, and does once what every one of them would do at first."""
    from calib_guidance.backend.light_imports import defer_imports

    defer_imports()
    import datasets  # noqa: F401 (these, before the forks)
    import torch._dynamo.config
    import torch.fx.experimental.symbolic_shapes  # noqa: F401 (of torch.autograd.grad)

    import calib_guidance.evaluation.evaluate  # noqa: F401
    from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning, subclasses_listed_once
    from calib_guidance.cli.parse_once import parts_parsed_once
    from tests import sketches

    class Prepared(CalibGuidanceCLI):
        def _run_subcommand(self, subcommand):
            """All parts are made, and nothing is run."""

    sketches.begin()
    kept.enter_context(subclasses_listed_once())
    kept.enter_context(parts_parsed_once())
    os.fsync = lambda file: None
    for config in ("predict/digits", "fit/digits_calibration"):
        quiet = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary", "logger")]
        run_lightning([config.partition("/")[0], f"--config={config}", "--trainer.accelerator=cpu", *quiet], Prepared)


if __name__ == "__main__":
    from calib_guidance.cli import main

    with contextlib.ExitStack() as kept:  # by all processes that are forked
        answers, errors, nowhere = os.dup(1), os.dup(2), os.open(os.devnull, os.O_WRONLY)
        # Of the descriptors: what logs keeps the streams that it finds.
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        _warm_up(kept)
        sys.stdout.flush()
        os.dup2(answers, 1)
        os.dup2(errors, 2)
        for line in sys.stdin:
            print(json.dumps(_answer(**json.loads(line))), flush=True)
