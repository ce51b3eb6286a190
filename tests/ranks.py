"""Runs commands with several ranks each, as torchrun starts them. ``python -m tests.ranks FILE``

The file is JSON, a list of ``[ranks, words]``; printed are the exit statuses of each command's ranks, null for one that does not
end. The ranks are forked, so that what they import is imported once.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import calib_guidance.cli.lightning  # noqa: F401 (before the forks)
from calib_guidance.cli import main

SECONDS = 90  # for one command


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork(rank, ranks, port, words):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.dup2(2, 1)  # standard output is for the statuses
        main(words)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(ranks, words):
    port = free_port()
    pids = [fork(rank, ranks, port, words) for rank in range(ranks)]
    found, end = dict.fromkeys(pids), time.monotonic() + SECONDS
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


if __name__ == "__main__":
    print(json.dumps([run(ranks, words) for ranks, words in json.loads(Path(sys.argv[1]).read_text())]))
