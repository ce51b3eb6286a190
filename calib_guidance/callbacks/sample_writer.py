"""Writes samples while the next ones are made."""

import functools
import io
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from calib_guidance import __version__
from calib_guidance.backend.atomic import check_writable
from calib_guidance.backend.distributed import available_cores, set_threads
from calib_guidance.backend.images import UINT8_RULES, Uint8Rule, to_uint8
from calib_guidance.backend.workers import Workers
from calib_guidance.callbacks.clean_stop import CleanStop
from calib_guidance.callbacks.measurement import Measurement, find_class_names, kept_measurements
from calib_guidance.callbacks.processes import share_work
from calib_guidance.errors import ConfigurationError, RunError, check_choice
from calib_guidance.plots import sample_grid
from calib_guidance.runs import RunFolder, read_run
from calib_guidance.runs.context import UNREADABLE
from calib_guidance.runs.identity import run_identity
from calib_guidance.samplers import StepRecord
from calib_guidance.tasks.retry import Samples

log = logging.getLogger(__name__)
_WAITING = 2  # batches that are made and not in their shard yet
_WRITING = 30.0  # seconds that a worker process has for writing what it has made


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run already. One that starts them on demand may find no memory for them in the middle of a run."""
    pool, all_run = ThreadPoolExecutor(threads, thread_name_prefix="background"), threading.Barrier(threads)
    try:
        wait([pool.submit(all_run.wait) for _ in range(threads)])
    except RuntimeError as error:
        all_run.abort()
        pool.shutdown()
        raise RunError(
            f"no thread could be started ({error}): raise the limit of processes (ulimit -u) or of memory, or end other "
            "processes. Re-run to resume"
        ) from error
    return pool


class Background:
    """Does jobs one after the other in a thread of its own, while at most ``waiting`` are given and not done.

    After a job has failed the later ones are skipped, and the main thread gets the error at its next call.
    """

    def __init__(self, waiting: int, threads: int | None = None):
        self.waiting = waiting
        self.error: BaseException | None = None  # of the first job that failed
        self._thread, self.pool = _started(1), _started(threads or available_cores())  # the pool is for jobs to use
        self._jobs: deque[Future[None]] = deque()

    def give(self, job: Callable[[], object]) -> None:
        """Give a job, as soon as there is room for it. Raises the error of an earlier one."""
        while len(self._jobs) >= self.waiting:
            wait([self._jobs.popleft()])
        self.check()
        self._jobs.append(self._thread.submit(self._do, job))

    def _do(self, job: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            job()
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raise the error of a job that failed."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Wait until all jobs are done. Raises the error of a job that failed."""
        wait(self._jobs)
        self._jobs.clear()
        self.check()

    def close(self) -> None:
        """Wait until all jobs are done, and take no more."""
        self._thread.shutdown()
        self.pool.shutdown()


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU beside the one that computes."""
    return torch.cuda.Stream(device)


def to_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start to copy tensors to the host, beside what a GPU computes next; nothing may change them in place meanwhile.

    Returns a function that waits for the copies and returns them, for any thread.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: {name: tensor.cpu() for name, tensor in tensors.items()}
    stream, done = _copies(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        pinned = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
        host = {name: pinned[name].copy_(tensor, non_blocking=True) for name, tensor in tensors.items()}
        done.record(stream)

    def copied() -> dict[str, Tensor]:
        done.synchronize()
        tensors.clear()  # kept until now, so that their memory is not reused
        return host

    return copied


def _png(image: np.ndarray) -> dict[str, Any]:
    """Cell of an image column: PNG of a uint8 image ``(C, H, W)``, gray or RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class _Shard:
    """Samples of the current shard, which the background thread collects."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {"image": []}
        self.failed: list[dict[str, Any]] = []
        self.seconds = 0.0

    def add(self, rows: range, columns: dict[str, Tensor], failed: list[dict], pool: ThreadPoolExecutor) -> None:
        """Add the rows of a batch: ``image`` uint8 ``(N, C, H, W)``, which the pool compresses, and the columns beside it."""
        images = columns.pop("image").numpy()
        for key, column in columns.items():
            self.columns.setdefault(key, []).extend(column.tolist())
        unread = set(rows) - set(columns["index"].tolist()) - {sample["index"] for sample in failed}
        self.failed += [*failed, *({"index": i, "step": None, "reason": UNREADABLE} for i in sorted(unread))]
        # Compressing releases Python's lock, and is most of what writing samples costs.
        self.columns["image"] += pool.map(_png, images)

    def table(self, class_names: Sequence[str] | None) -> pa.Table:
        """The samples, as ``datasets`` reads them."""
        import datasets

        features = {key: datasets.Value("int64") for key in self.columns if key != "image"}
        if class_names is not None and "label" in features:
            features["label"] = datasets.ClassLabel(names=list(class_names))
        schema = datasets.Features(features | {"image": datasets.Image()}).arrow_schema
        return pa.Table.from_pydict(self.columns, schema=schema)


class SampleWriter(Measurement):
    """Writes the samples of a run in shards, each once and atomically: a run that is stopped at any instant can be resumed.

    The images are the ``image`` of the predict step; its further columns and those of the requests, all integers, are written
    beside them. See :mod:`calib_guidance.runs.store` for the files of the folder;
    ``datasets.load_dataset("parquet", data_files="FOLDER/samples/*.parquet")`` reads it.

    Copies to the host, encoding and writing run beside the next batch, two batches behind at most. Re-running the command
    resumes the run, with any number of devices and any batch size; independent jobs may work at the same time. A configuration
    that would change pixels is rejected; more samples extend the run. With fewer, complete shards beyond them are kept, and
    not counted.

    Args:
        uint8_rule: see :func:`calib_guidance.backend.images.to_uint8`.
        restart: remove an earlier run from the folder first, with its samples.
        lease: seconds after which a worker without a sign of life is dead, and its shard is reclaimed.
        stop_within: seconds within which SIGTERM, SIGUSR1 or Ctrl-C are answered, see
            :class:`~calib_guidance.callbacks.clean_stop.CleanStop`.
    """

    def __init__(
        self, uint8_rule: Uint8Rule = "truncate", restart: bool = False, lease: float = 600.0, stop_within: float = 60.0
    ):
        check_choice("uint8_rule", uint8_rule, UINT8_RULES)
        if not lease > 0:
            raise ConfigurationError(f"lease must be a number of seconds above 0, got {lease}")
        self.uint8_rule, self.restart, self.lease = uint8_rule, restart, lease
        self.stop = CleanStop(stop_within)
        self.run: RunFolder | None = None
        self._background: Background | None = None
        self._workers = Workers()

    def earlier_run(self, trainer: L.Trainer) -> bool:
        """Whether the folder holds a run, of whatever configuration; ConfigurationError for one that cannot be resumed."""
        run = RunFolder(trainer.default_root_dir, 1, 1, self.lease)
        if not self.restart:
            run.check_readable()
        return (run.path / "run.json").exists()

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path, requests, configuration = Path(trainer.default_root_dir), trainer.datamodule, self.context.configuration
        self._class_names = find_class_names(requests, pl_module)
        check_writable(path, "trainer.default_root_dir")
        if configuration is None or trainer.fast_dev_run:
            raise ConfigurationError(
                "SampleWriter stores the configuration with the samples, and has none: sample with `calib-guidance predict`, "
                "or with calib_guidance.cli.commands.main from Python, without fast_dev_run"
            )
        identity = run_identity(configuration, pl_module.networks(), str(trainer.precision), self.uint8_rule)
        # Not where a launcher restarts a worker in the middle of the run.
        if self.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            trainer.strategy.barrier("the earlier run is still there")
            if trainer.is_global_zero and (removed := RunFolder(path, 1, 1, self.lease).remove()):
                rank_zero_info(f"{path}: removed the earlier run: {removed}")
            trainer.strategy.barrier("the earlier run is removed")
        earlier = read_run(path)
        size = requests.shard_size or (earlier["shard_size"] if earlier else requests.batch_size)
        run = RunFolder(path, size, len(requests), self.lease)
        versions = {"calib_guidance": __version__, "torch": torch.__version__, "python": platform.python_version()}
        run.begin(identity, versions)
        self.run = self.context.store = run
        self.context.shards = run.remaining(verify=True)
        self._log_state(self.context.shards)
        self.context.observe(self._observe)

    def _observe(self, record: StepRecord) -> None:
        self.run.claims.renew()  # a batch may take longer than the lease
        self._workers.check()
        self.stop(record)

    def _log_state(self, remaining: list[range]) -> None:
        """Log what is in the folder, if anything is."""
        path, shards = self.run.path, self.run.shards()
        if done := len(shards) - len(remaining):
            rank_zero_info(f"{path}: {done} of {len(shards)} shards are done")
        if (count := self.run.extended().num_requests) > self.run.num_requests:
            rank_zero_info(f"{path} is a run of {count} samples, on which others work: all are kept and reported on")
        if surplus := sum(map(len, self.run.extended().surplus())):
            rank_zero_info(f"{path}/samples holds {surplus} samples beyond those requested: kept, and not counted")
        for shard in remaining:
            if (state := self.run.state(shard, verify=True)).name == "corrupted":
                log.warning(f"{path}: samples {shard.start} … {shard[-1]} are regenerated: {state.reason}")
        if foreign := [str(file.relative_to(path)) for file in self.run.foreign()]:
            names = f"{', '.join(foreign[:5])}{' …' if len(foreign) > 5 else ''}"
            log.warning(f"{path}: {len(foreign)} files belong to no shard, and are not counted: {names}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._workers = workers = self.context.workers  # those of the context from now on, when they may fork
        if self.context.num_processes != 1:
            share_work(trainer, pl_module, self.context)
        if workers.is_first:
            self.stop.forward = workers.send
        else:
            self.run.rename_worker()
        self.stop.install(trainer)
        # Before the first claim, as there may be no threads.
        self._background = Background(_WAITING, max(1, available_cores() // workers.count))
        self.kept = kept_measurements(self.context)  # not in setup, before others have registered
        for measurement in self.kept.values():
            measurement.reset()
        device = trainer.strategy.root_device
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._shard = _Shard()

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._background.check()
        self._workers.check()
        self.run.claims.renew()
        self.stop.begin(batch["shard"].num_left)
        self._started = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Samples, batch: dict[str, Any], *_: Any
    ) -> None:
        # The step has asked the device whether all is finite, so the samples are complete.
        seconds = time.perf_counter() - self._started
        part, rows = batch["shard"], {key: column for key, column in batch.items() if key != "shard"} | outputs.columns
        if failed := {sample["index"] for sample in outputs.failed}:
            kept = [row for row, index in enumerate(rows["index"].tolist()) if index not in failed]
            place = torch.tensor(kept, dtype=torch.long)
            rows = {key: column[place.to(column.device)] for key, column in rows.items()}
        for measurement in self.kept.values():
            measurement.finished(rows["image"], rows["label"])
        columns = to_host(rows | {"image": to_uint8(rows["image"], self.uint8_rule)})
        named = [sample | {"configuration": self.run.fingerprint} for sample in outputs.failed]
        sums, finished = self._take_sums() if part.is_last else None, time.monotonic()

        def keep() -> None:  # in the background
            self._shard.add(part.rows, columns(), named, self._background.pool)
            self._shard.seconds += seconds
            self.run.claims.renew()  # the main thread may be waiting for this one
            if sums is not None:
                self._write(part.shard, sums())
                self.stop.behind = time.monotonic() - finished

        self._background.give(keep)
        self.stop.end(len(part.rows), self._background.finish)

    def _take_sums(self) -> Callable[[], dict[str, Tensor]]:
        """What measurements keep of the shard, which they forget."""
        sums = {}
        for name, measurement in self.kept.items():
            kept = measurement.sums() | measurement.rows()
            sums |= {f"{name}.{key}": value.detach().clone() for key, value in kept.items()}
            measurement.reset()
        return to_host(sums)

    def _write(self, shard: range, sums: dict[str, Tensor]) -> None:
        made, self._shard = self._shard, _Shard()
        arrays = {name: value.numpy() for name, value in sums.items()}
        if not self.run.write(shard, made.table(self._class_names), arrays, made.failed, made.seconds, self._device):
            log.warning(
                f"samples {shard.start} … {shard[-1]} were reclaimed by another worker, which took this one for dead: raise "
                f"the SampleWriter's lease ({self.lease:g} s) above the seconds of a batch"
            )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._background.finish()
        if not self._workers.is_first:
            self._release()
            self._workers.leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()
        if not self._workers.is_first:
            self._workers.leave(exception)
        # A signal has been forwarded already; the second one would stop them at once.
        self._workers.stop(self.stop.within + _WRITING, ask=self.stop.signal is None)
        if (error := self._background and self._background.error) not in (None, exception):
            log.error(f"the last samples are not written: {error}")
        self.stop.requeue()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()
        if stage == "predict":
            self.stop.install(trainer)  # if nothing was left to sample, and a report follows
            if self.context.num_processes != 1:
                set_threads(trainer.num_devices)  # for the report, all

    def _release(self) -> None:
        """Release unfinished shards, after those that are made have been written."""
        if self._background is not None:
            self._background.close()
        if self.run is not None:
            self.run.claims.release()

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        run = self.run.extended()
        records = [run.record(shard) for shard in run.shards()]
        requested, rows, seconds = (sum(r[key] for r in records) for key in ("requested", "rows", "seconds"))
        failed = [sample for record in records for sample in record["failed"]]
        found = {"num_samples": rows, "uint8_rule": self.uint8_rule, "seconds_per_image": seconds / requested}
        return found | ({"failed": failed} if failed else {})

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        run = self.run.extended()
        if not any(record["rows"] for record in run.readable_records()):  # all failed
            return []
        names = {number: name.replace("$", r"\$") for number, name in enumerate(self._class_names or ())}
        return sample_grid((run.read(shard) for shard in run.shards()), folder / "samples", names=names)
