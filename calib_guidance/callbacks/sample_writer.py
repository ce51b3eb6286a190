"""Writes samples as they are made."""

from __future__ import annotations

import io
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from calib_guidance import __version__
from calib_guidance.backend.images import UINT8_RULES, to_uint8
from calib_guidance.callbacks.background import Background, to_host
from calib_guidance.callbacks.clean_stop import CleanStop
from calib_guidance.callbacks.identity import measurement_names, run_identity
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.errors import ConfigurationError
from calib_guidance.plots import sample_grid
from calib_guidance.runs import RunFolder, read_table

log = logging.getLogger(__name__)
UNREADABLE = "its image cannot be read"
_FEWEST_BLOCKS, _MOST_BLOCKS = 5, 50  # of which a spread is taken, in memory at a time
_WAITING = 2  # batches that are made and not in their shard yet


def _png(image: np.ndarray) -> bytes:
    """PNG of a uint8 image ``(C, H, W)``, grey or RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _tensors(table: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in table.items()}


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of both; the shape of a row is not known where there are none."""
    return np.concatenate([a, b]) if len(a) and len(b) else a if len(a) else b


def read_samples(folder: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
    """Written samples, file by file in order of index.

    Yields:
        ``image`` uint8 ``(N, C, H, W)`` and every other column ``(N,)``: ``index``, ``label``, ``seed`` …
    """
    for path in sorted(Path(folder).glob("*.parquet")):
        yield _tensors(read_table(path))


class _Made(NamedTuple):
    """A batch on its way into its shard.

    Attributes:
        shard, rows: what it is of, and the requests that were asked for with it.
        columns: waits for ``image`` uint8 ``(N, C, H, W)`` and the columns beside it.
        wrong: ``{index, step, reason, configuration}`` of samples that could not be made.
        seconds: that it took.
        sums: waits for those of the shard, of which this is the last batch; None with the others.
        at: when it was made, on the clock of time.monotonic.
    """

    shard: range
    rows: range
    columns: Callable[[], dict[str, Tensor]]
    wrong: list[dict[str, Any]]
    seconds: float
    sums: Callable[[], dict[str, Tensor]] | None
    at: float


class SampleWriter(Measurement):
    """Keeps the samples of a run in shards, each written once and whole: a run can be stopped at any instant and goes on.

    The images are what the module's predict step returns as ``image``; its further columns and those of the requests, all whole
    numbers, are written beside them. See :class:`~calib_guidance.runs.RunFolder` for what the folder holds;
    ``datasets.load_dataset("parquet", data_files="FOLDER/samples/*.parquet")`` reads it.

    Copies to the host, encoding and writing go on beside the next batch, two batches behind at most. Given again, the same
    command does what is left, with any number of devices and any batch size; several that know nothing of
    each other may work at the same time. Whatever would change pixels is refused, but more samples are made as asked.

    Args:
        folder: of the run; the trainer's default_root_dir by default.
        uint8_rule: see :func:`calib_guidance.backend.images.to_uint8`.
        restart: remove an earlier run from the folder first, with its samples.
        lease: seconds after which a worker that gives no sign of life is dead, and its shard another's.
        stop_within: seconds within which SIGTERM, SIGUSR1 or Ctrl-C are answered, see
            :class:`~calib_guidance.callbacks.clean_stop.CleanStop`.

    Raises:
        ConfigurationError: an unknown rule, a lease or a ``stop_within`` that is no time; before sampling, a folder that cannot
            be written or holds the samples of another configuration.
    """

    def __init__(
        self,
        folder: str | None = None,
        uint8_rule: str = "truncate",
        restart: bool = False,
        lease: float = 600.0,
        stop_within: float = 60.0,
    ):
        if uint8_rule not in UINT8_RULES:
            raise ConfigurationError(f"uint8_rule: unknown {uint8_rule!r}; known: {', '.join(UINT8_RULES)}")
        if not lease > 0:
            raise ConfigurationError(f"lease must be a number of seconds above 0, got {lease}")
        self.folder, self.uint8_rule, self.restart, self.lease = folder, uint8_rule, restart, lease
        self.stop = CleanStop(stop_within)
        self.run: RunFolder | None = None
        self._background: Background | None = None
        self._unfinished: range | None = None  # a shard of which batches are made, and not yet the last
        self._given_up: range | None = None

    def target(self, trainer: L.Trainer) -> Path:
        """The folder of the run."""
        return Path(self.folder or trainer.default_root_dir)

    def earlier_run(self, trainer: L.Trainer) -> bool:
        """Whether the folder holds a run, of whatever configuration.

        Raises:
            ConfigurationError: it cannot be gone on with: its run.json is missing or damaged.
        """
        run = RunFolder(self.target(trainer), 1, 1, self.lease)
        if not self.restart:
            run.check_readable()
        return (run.path / "run.json").exists()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        pl_module.check()  # nothing of an earlier run is touched for a configuration that cannot run
        self._check_writable(self.target(trainer))
        self.run = self._begin(trainer, pl_module)
        remaining = self.run.remaining(verify=True)
        self._tell(remaining)
        trainer.datamodule.run_folder, trainer.datamodule.remaining = self.run, remaining
        if hasattr(pl_module, "observers"):  # a batch may take longer than the lease
            pl_module.observers += [lambda record: self.run.claims.renew(), self.stop]

    @staticmethod
    def _check_writable(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"the output folder {folder} cannot be written ({error.strerror or error}): set trainer.default_root_dir "
                "to one that can"
            ) from error

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> RunFolder:
        path, requests = self.target(trainer), trainer.datamodule
        identity = run_identity(trainer, pl_module, self.uint8_rule)
        # Not where a launcher starts a worker anew, that is in the middle of the run.
        if self.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            trainer.strategy.barrier("the earlier run is still there")
            if trainer.is_global_zero:
                RunFolder(path, 1, 1, self.lease).remove()
            trainer.strategy.barrier("the earlier run is removed")
        earlier = RunFolder.read_run(path)
        size = requests.shard_size or (earlier["shard_size"] if earlier else requests.batch_size)
        run = RunFolder(path, size, len(requests), self.lease)
        versions = {"calib_guidance": __version__, "torch": torch.__version__, "python": platform.python_version()}
        run.begin(identity, versions)
        return run

    def _tell(self, remaining: list[range]) -> None:
        """What there is already, where there is something."""
        done = len(self.run.shards()) - len(remaining)
        if done:
            rank_zero_info(f"{self.run.path}: {done} of {len(self.run.shards())} shards are done")
        if (there := self.run.extended().num_requests) > self.run.num_requests:
            rank_zero_info(f"{self.run.path} is a run of {there} samples: all of them stay, and are reported on")
        for shard in remaining:
            if (state := self.run.state(shard, verify=True)).name == "corrupted":
                log.warning(f"{self.run.path}: samples {shard.start} … {shard[-1]} are regenerated: {state.reason}")
        if foreign := self.run.foreign():
            names = ", ".join(str(path.relative_to(self.run.path)) for path in foreign[:5])
            log.warning(
                f"{self.run.path}: {len(foreign)} files belong to no shard, and are not counted: {names}"
                f"{' …' if len(foreign) > 5 else ''}"
            )

    def _forget(self) -> None:
        """Begin a shard, in the background."""
        self._columns: dict[str, list[Any]] = {"image": []}
        self._left_out: list[dict[str, Any]] = []
        self._seconds = 0.0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.install(trainer)
        self.measurements = measurement_names(trainer)  # not in setup, where some may not have been set up themselves
        for measurement in self.measurements.values():
            measurement.reset()
        device = trainer.strategy.root_device
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._background, self._unfinished, self._given_up = Background(_WAITING), None, None
        self._forget()

    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._background.check()
        self.run.claims.renew()
        loader = trainer.predict_dataloaders
        self.stop.begin(loader.shard.stop - loader.rows.start)
        self._started = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # The step has asked the device whether all is finite, so that the samples are there.
        seconds = time.perf_counter() - self._started
        loader, rows = trainer.predict_dataloaders, batch | outputs
        wrong = [sample._asdict() | {"configuration": self.run.fingerprint} for sample in pl_module.left_out]
        if wrong:
            bad, found = {sample["index"] for sample in wrong}, rows["index"].tolist()
            kept = torch.tensor([row for row, index in enumerate(found) if index not in bad], dtype=torch.long)
            rows = {key: column[kept.to(column.device)] for key, column in rows.items()}
        for measurement in self.measurements.values():
            measurement.finished(rows["image"], rows["label"])
        last = loader.rows.stop == loader.shard.stop
        columns = to_host(rows | {"image": to_uint8(rows["image"], self.uint8_rule)})
        sums = self._sums() if last else None
        made = _Made(loader.shard, loader.rows, columns, wrong, seconds, sums, time.monotonic())
        self._background.give(lambda: self._keep(made))
        self._unfinished = None if last else loader.shard
        self.stop.end(len(loader.rows), self._background.finish)

    def _sums(self) -> Callable[[], dict[str, Tensor]]:
        """What measurements keep of the shard, which they forget."""
        sums = {
            f"{name}.{key}": value.detach().clone()
            for name, measurement in self.measurements.items()
            for key, value in (measurement.sums() | measurement.rows()).items()
        }
        for measurement in self.measurements.values():
            measurement.reset()
        return to_host(sums)

    def _keep(self, made: _Made) -> None:
        """Take a batch into its shard, in the background, and write the shard with its last one."""
        if made.shard == self._given_up:
            return
        columns = made.columns()
        images = columns.pop("image").numpy()
        found = {key: column.tolist() for key, column in columns.items()}
        for key, column in found.items():
            self._columns.setdefault(key, []).extend(column)
        unread = set(made.rows) - set(found["index"]) - {sample["index"] for sample in made.wrong}
        self._left_out += [*made.wrong, *({"index": i, "step": None, "reason": UNREADABLE} for i in sorted(unread))]
        self._seconds += made.seconds
        # Compressing lets go of Python's lock, and is most of what keeping samples costs.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            self._columns["image"] += [{"bytes": png, "path": None} for png in pool.map(_png, images)]
        self.run.claims.renew()  # the main thread may be waiting for this one
        if made.sums is not None:
            self._write(made.shard, made.sums())
            self.stop.behind = time.monotonic() - made.at

    def _write(self, shard: range, sums: dict[str, Tensor]) -> None:
        features = {key: datasets.Value("int64") for key in self._columns if key != "image"}
        schema = datasets.Features(features | {"image": datasets.Image()}).arrow_schema
        table = pa.Table.from_pydict(self._columns, schema=schema)
        arrays = {name: value.numpy() for name, value in sums.items()}
        if not self.run.write(shard, table, arrays, self._left_out, self._seconds, self._device):
            log.warning(
                f"samples {shard.start} … {shard[-1]} were reclaimed by another worker, which took this one for dead: raise "
                f"the SampleWriter's lease ({self.lease:g} s) above the seconds of a batch"
            )
        self._forget()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._background.finish()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._given_up = self._unfinished
        self._release()
        if (error := self._background and self._background.error) not in (None, exception):
            log.error(f"what was made last is not written: {error}")
        self.stop.requeue()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()
        if stage == "predict":
            self.stop.install(trainer)  # where nothing was left to sample, and a report follows

    def _release(self) -> None:
        """Let others have what is not finished, when shards that are made have been written."""
        if self._background is not None:
            self._background.close()
        if self.run is not None:
            self.run.claims.release()

    def results(self, trainer: L.Trainer) -> dict[str, object]:
        run = self.run.extended()
        records = [run.record(shard) for shard in run.shards()]
        requested = sum(record["requested"] for record in records)
        left_out = [sample for record in records for sample in record["failed"]]
        return {
            "num_samples": sum(record["rows"] for record in records),
            "uint8_rule": self.uint8_rule,
            "seconds_per_image": sum(record["seconds"] for record in records) / requested,
            **({"failed": left_out} if left_out else {}),
        }

    def load_sums(self, trainer: L.Trainer) -> None:
        """Give every measurement what is kept of the whole folder, or nothing where some shard was made without it."""
        run, measurements = self.run.extended(), measurement_names(trainer)
        joined = {f"{name}.{key}" for name, measurement in measurements.items() for key in measurement.rows()}
        added = {f"{name}.{key}" for name, measurement in measurements.items() for key in measurement.sums()}
        totals: dict[str, np.ndarray] = {}
        shards = run.shards()
        num_blocks = min(len(shards), _MOST_BLOCKS)
        blocks: list[dict[str, np.ndarray]] = [{} for _ in range(num_blocks)]
        for number, shard in enumerate(shards):
            kept = run.read_sums(shard)
            block = blocks[number * num_blocks // len(shards)]
            for key in added & kept.keys():
                fits = key in block and block[key].shape == kept[key].shape
                block[key] = block[key] + kept[key] if fits else kept[key]
            both = totals.keys() & kept.keys() if number else set()
            totals = {
                **({} if number else kept),
                **{key: totals[key] + kept[key] for key in both - joined if totals[key].shape == kept[key].shape},
                **{key: _join(totals[key], kept[key]) for key in both & joined},
            }
        for name, measurement in measurements.items():
            measurement.reset()
            expected = measurement.sums() | measurement.rows()
            found = {key: torch.from_numpy(totals[f"{name}.{key}"]) for key in expected if f"{name}.{key}" in totals}
            if found.keys() == expected.keys():
                measurement.load(found)
                if num_blocks >= _FEWEST_BLOCKS:
                    names = {key: f"{name}.{key}" for key in measurement.sums()}
                    sums = {key: np.stack([block[full] for block in blocks]) for key, full in names.items()}
                    measurement.load_blocks({key: torch.from_numpy(value) for key, value in sums.items()})
            else:
                log.warning(
                    f"{type(measurement).__name__} is left out of the report: some samples were made without it, or with other "
                    "settings of it"
                )

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        run = self.run.extended()
        return sample_grid((run.read(shard) for shard in run.shards()), folder / "samples")
