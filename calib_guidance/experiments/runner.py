"""Many runs by worker processes, done once each: what ``compare`` and ``sweep`` share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import queue
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calib_guidance.cli.lightning import run_lightning, subclasses_listed_once
from calib_guidance.errors import ConfigurationError, FailedSamplesError, StoppedError
from calib_guidance.runs import RunFolder

OVERLAYS = Path("lightning_configs")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
# Modules that look at runs or start them: a change of theirs changes no run.
_NO_PART_OF_A_RUN = {"cli", "compare", "doctor", "export", "report", "runs", "status", "sweep"}
_WITHOUT_LIGHTNING = {"evaluate": "calib_guidance.evaluation.evaluate"}  # modules with a function of the command's name


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        row: index of the row of the table that it is of.
        seed: of what is random in it.
        commands: words for the command line, one after the other.
        folder: where it writes.
        fingerprint: hash of all that changes its result.
        needs: folder of a run that must be done before it, or None.
        same: folders of runs that differ from it in the number of samples alone, whose samples it may begin with.
        num_samples: how many it asks for; used only with ``same``.
    """

    row: int
    seed: int
    commands: tuple[tuple[str, ...], ...]
    folder: Path
    fingerprint: str
    needs: Path | None = None
    same: tuple[Path, ...] = ()
    num_samples: int = 0

    def done(self) -> bool:
        """Whether an earlier run with the same fingerprint came to its end."""
        mark = self.folder / "fingerprint"
        return mark.is_file() and mark.read_text() == self.fingerprint


@functools.cache
def sources() -> bytes:
    """The package's code as far as runs depend on it: a change of it may change what comes out, so it makes old runs stale."""
    root = Path(__file__).parent
    parts = ((path.relative_to(root).parts[0].removesuffix(".py"), path) for path in sorted(root.rglob("*.py")))
    return b"".join(path.read_bytes() for part, path in parts if part not in _NO_PART_OF_A_RUN)


def check_keys(found: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise ConfigurationError for keys that are not among the known ones."""
    if unknown := found.keys() - set(known):
        raise ConfigurationError(f"{where}: unknown keys {sorted(unknown)}; known: {sorted(known)}")


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of what is known; None where there is nothing, or one value alone."""
    known = [value for value in values if value is not None]
    return (
        statistics.mean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
    )


def cell(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over seeds, for a table."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


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


def _command(words: Sequence[str]) -> None:
    if words[0] in _WITHOUT_LIGHTNING:
        getattr(importlib.import_module(_WITHOUT_LIGHTNING[words[0]]), words[0])(words[1:])
    else:
        run_lightning(words)


def work(run: Run, threads: int) -> list[str]:
    """Do one run, its output in a file beside what it writes.

    One that was interrupted goes on where it can; what another configuration or other code has left is removed.

    Args:
        run: what to do.
        threads: of PyTorch.

    Returns:
        What is to be said of the run although it is done.
    """
    remarks = []
    torch.set_num_threads(threads)
    begun, done = run.folder / "begun", run.folder / "fingerprint"
    if not begun.is_file() or begun.read_text() != run.fingerprint:
        shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    begun.write_text(run.fingerprint)
    for other in run.same:
        RunFolder.begin_with(run.folder, other, run.num_samples)
    with _output_in(run.folder / "log.txt"), subclasses_listed_once():
        for words in run.commands:
            try:
                _command(words)
            except FailedSamplesError as error:  # its figures are those of the samples that there are
                remarks.append(str(error))
    done.write_text(run.fingerprint)
    return remarks


def _see_one_device(devices: multiprocessing.Queue) -> None:
    """Let this worker process see one device, before it has looked for any."""
    with contextlib.suppress(queue.Empty):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get(timeout=10)


def _ready(waiting: Mapping[Path, Run], doing: Collection[Run]) -> list[Run]:
    """Runs that need none of those that are not done."""
    undone = waiting.keys() | {run.folder for run in doing}
    return [run for run in waiting.values() if run.needs not in undone]


class _Here(Executor):
    """One run at a time in this process, which has loaded already what a worker would have to load."""

    def submit(self, do: Callable[..., Any], /, *args: object) -> Future:
        job: Future = Future()
        try:
            job.set_result(do(*args))
        except Exception as error:
            job.set_exception(error)
        return job


def _workers(number: int, threads: int, devices: Sequence[str]) -> Executor:
    """Who does the runs: this process where one is enough, else spawned ones, each of which sees one of the devices in turn."""
    if number == 1 and not devices:
        return _Here()
    # Without spinning threads, since the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    if not devices:
        return ProcessPoolExecutor(number, context)
    seen = context.Queue()
    for device in itertools.islice(itertools.cycle(devices), number):
        seen.put(device)
    return ProcessPoolExecutor(number, context, _see_one_device, (seen,))


def do_runs(runs: Sequence[Run], workers: int, devices: Sequence[str] = (), before: str = "") -> list[Run]:
    """Do runs by worker processes and show how far they are.

    Args:
        runs: those that are to be done.
        workers: runs at a time; the cores are shared among them.
        devices: for CUDA_VISIBLE_DEVICES; each worker sees one of them, in turn. Empty leaves what the process sees.
        before: said beside the bar.

    Returns:
        Those that failed. Their logs say why; an error is printed as it comes.
    """
    workers = max(1, min(workers, len(runs)))
    threads, usual = max(1, (os.cpu_count() or 1) // workers), torch.get_num_threads()
    failed: list[Run] = []
    with _workers(workers, threads, devices) as pool, tqdm(total=len(runs), desc=before, unit="run") as bar:
        waiting = {run.folder: run for run in runs}
        jobs: dict[Future, Run] = {}
        while waiting or jobs:
            try:
                for run in _ready(waiting, jobs.values())[: workers - len(jobs)]:
                    jobs[pool.submit(work, run, threads)] = run
                    del waiting[run.folder]
            except BrokenProcessPool:  # killed, for want of memory perhaps, and with it the others
                failed += waiting.values()
                waiting.clear()
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                run = jobs.pop(job)
                bar.update()
                if error := job.exception():
                    failed.append(run)
                    tqdm.write(f"failed: {run.folder / 'log.txt'}: {error}")
                    if isinstance(error, StoppedError):  # this command was asked to end, not that run alone
                        failed += waiting.values()
                        waiting.clear()
                    continue
                for remark in job.result():
                    tqdm.write(f"{run.folder}: {remark}")
    torch.set_num_threads(usual)
    return failed
