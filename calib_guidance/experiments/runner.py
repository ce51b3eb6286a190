"""Runs in worker processes, each done once."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calib_guidance.backend.atomic import end_with_parent
from calib_guidance.backend.distributed import available_cores
from calib_guidance.cli import measure_options
from calib_guidance.cli.lightning import run_lightning, subclasses_listed_once
from calib_guidance.errors import FailedSamplesError, StoppedError
from calib_guidance.evaluation.evaluate import evaluate
from calib_guidance.runs import RunFolder

_DONE = "done"  # marker file in the folder of a run; with a number, of each of its commands


@dataclass(frozen=True)
class Run:
    """One run."""

    setting: int  # its index
    seed: int
    commands: tuple[tuple[str, ...], ...]  # command lines, one after the other
    folder: Path  # where it writes; its name is a hash of all that changes the result
    needs: Path | None = None  # folder of a run that must be done before it
    same: tuple[Path, ...] = ()  # of runs that differ in the number of samples alone, whose samples it may start with
    num_samples: int = 0  # that it asks for; used only with ``same``

    def done(self) -> bool:
        """Whether an earlier run in this folder finished."""
        return (self.folder / _DONE).is_file()


@contextlib.contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes into a file."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(path, "w") as log:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
    finally:
        sys.stdout.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _resume(command: Sequence[str]) -> Sequence[str]:
    """The command, which continues where its training was interrupted; ``predict`` and ``evaluate`` do by themselves."""
    folders = [word.partition("=")[2] for word in command if word.startswith("--trainer.default_root_dir=")]
    interrupted = command[0] == "fit" and any(Path(folders[-1]).rglob("last*.ckpt"))
    return [*command, "--ckpt_path", "last"] if interrupted else command


def work(run: Run, threads: int) -> list[str]:
    """Do one run, or what is left of it, with its output in a log file; returns remarks on a run that is done all the same."""
    remarks = []
    torch.set_num_threads(threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    for other in run.same:
        RunFolder.begin_with(run.folder, other, run.num_samples)
    with _output_in(run.folder / "log.txt"), subclasses_listed_once():
        for number, command in enumerate(run.commands):
            if (finished := run.folder / f"{_DONE}-{number}").is_file():
                continue
            try:
                if command[0] == "evaluate":
                    evaluate(measure_options.evaluate(command[1:]))
                else:
                    run_lightning(_resume(command))
            except FailedSamplesError as error:  # its metrics are those of the samples that there are
                remarks.append(str(error))
            finished.touch()
    (run.folder / _DONE).touch()
    return remarks


def _start_worker(devices: multiprocessing.Queue | None) -> None:
    """Let this worker process see one device, before it has looked for any, and end with the process that gives it runs."""
    end_with_parent()
    if devices is not None:
        with contextlib.suppress(queue.Empty):
            os.environ["CUDA_VISIBLE_DEVICES"] = devices.get(timeout=10)


class _Here(Executor):
    """One run at a time in this process, which has loaded already what a worker would have to load."""

    def submit(self, do: Callable[..., Any], /, *args: object) -> Future:
        job = Future()
        try:
            job.set_result(do(*args))
        except Exception as error:
            job.set_exception(error)
        return job


def _workers(number: int, threads: int, devices: Sequence[str]) -> Executor:
    """Who does the runs: this process where one is enough, else spawned ones; each sees one of the devices in turn."""
    if number == 1 and not devices:
        return _Here()
    # Without spinning threads, since the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    seen = context.Queue() if devices else None
    for device in itertools.islice(itertools.cycle(devices), number):
        seen.put(device)
    return ProcessPoolExecutor(number, context, _start_worker, (seen,))


def do_runs(runs: Sequence[Run], workers: int, devices: Sequence[str] = (), before: str = "") -> list[Run]:
    """Do runs by worker processes, show how far they are, and return those that failed, whose errors are printed and logged.

    Args:
        runs: those that are to be done.
        workers: runs at a time; the cores are shared among them.
        devices: for CUDA_VISIBLE_DEVICES; each worker sees one of them, in turn. Empty leaves what the process sees.
        before: said beside the bar.
    """
    workers = max(1, min(workers, len(runs)))
    threads, usual = max(1, available_cores() // workers), torch.get_num_threads()
    failed, waiting, jobs = [], {run.folder: run for run in runs}, {}
    with _workers(workers, threads, devices) as pool, tqdm(total=len(runs), desc=before, unit="run") as bar:
        while waiting or jobs:
            undone = waiting.keys() | {run.folder for run in jobs.values()}
            ready = [run for run in waiting.values() if run.needs not in undone]
            stopped = False  # with the runs that wait
            try:
                for run in ready[: workers - len(jobs)]:
                    jobs[pool.submit(work, run, threads)] = run
                    del waiting[run.folder]
            except BrokenProcessPool:  # killed, for want of memory perhaps, and with it the others
                stopped = True
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                run = jobs.pop(job)
                bar.update()
                if error := job.exception():
                    failed.append(run)
                    tqdm.write(f"failed: {run.folder / 'log.txt'}: {error}")
                    stopped |= isinstance(error, StoppedError)  # this command was asked to end, not that run alone
                else:
                    for remark in job.result():
                        tqdm.write(f"{run.folder}: {remark}")
            if stopped:
                failed += waiting.values()
                waiting.clear()
    torch.set_num_threads(usual)
    return failed
