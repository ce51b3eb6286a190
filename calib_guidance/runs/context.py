"""Sampling context: one object that the task, the loader, the writer and the measurements of a sampling run share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from calib_guidance.backend.workers import Workers
from calib_guidance.runs.folder import RunFolder
from calib_guidance.samplers.base import BufferedObserver, Observer

UNREADABLE = "its image cannot be read"


class ShardPart:
    """The indices of a shard, and those of the rows of it that a batch was requested with, as ``batch["shard"]``.

    Lightning takes tuples and dataclasses apart when it moves a batch to the device, and leaves this class as it is.
    """

    def __init__(self, shard: range, rows: range):
        self.shard, self.rows = shard, rows
        self.num_left = shard.stop - rows.start  # samples of the shard from this batch on
        self.is_last = rows.stop == shard.stop


class SamplingContext:
    """What task, loader, writer and measurements of one sampling run share. The task owns it.

    The command line gives it the configuration, the writer its run folder in ``setup``; observers and measurements register in
    ``setup``; the loader takes shards from it.
    """

    def __init__(self, shards: Sequence[range] = ()):
        self.configuration: Mapping[str, Any] | None = None  # resolved; None in a run that was not started from one
        self.store: RunFolder | None = None  # None in a run that writes nothing
        self.shards = list(shards)  # not done when the run started; all in order where nothing is written
        self.observers: list[Observer] = []  # of every step
        self.measurements: list[Any] = []  # of the run, in the order of their registration
        self.indices: list[int] = []  # of the samples that the current attempt makes, row by row
        self.report = ""  # what was printed of the complete run
        self.workers = Workers()
        self.num_processes: int | None = 1  # asked for; None leaves the choice to the writer
        self._displays: list[Callable[[float, str], Any]] = []

    def observe(self, observer: Observer) -> None:
        """Register an observer of every step, once."""
        if observer not in self.observers:
            self.observers.append(observer)

    def measure(self, measurement: Any) -> None:
        """Register a :class:`~calib_guidance.callbacks.Measurement`, once."""
        if measurement not in self.measurements:
            self.measurements.append(measurement)

    def display(self, show: Callable[[float, str], Any]) -> None:
        """Register what shows progress: called with the number of samples that all processes have made, and a text; once."""
        if show not in self._displays:
            self._displays.append(show)

    def progress(self, done: float, text: str = "") -> None:
        """Tell how many samples this process has made; the first process shows the sum."""
        total = self.workers.share(done)
        for show in self._displays if self.workers.is_first else ():
            show(total, text)

    def take(self) -> Iterator[range]:
        """Shards for this worker, claimed if there is a run folder."""
        yield from self.shards if self.store is None else self.store.take(self.shards)

    def reclaim(self) -> Iterator[range]:
        """Shards that dead workers left, claimed; for the time after :meth:`take`."""
        if self.store is None:
            return
        yield from self.store.reclaim()
        while self.workers.wait(self._show):  # the shard of one that was killed
            yield from self.store.reclaim()

    def _show(self) -> None:
        for show in self._displays:
            show(self.workers.total(), "waiting for the other processes")

    def count(self, rows: slice | Tensor) -> None:
        """Tell observers that wait for it which rows of the current attempt are kept."""
        for observer in self.observers:
            if isinstance(observer, BufferedObserver):
                observer.count(rows)

    def failed(self) -> list[dict[str, Any]]:
        """``{index, step, reason}`` of the failed samples of a complete run, without images that could not be read."""
        run = None if self.store is None else self.store.extended()
        if run is None or run.remaining():
            return []
        failed = (sample for record in run.readable_records() for sample in record["failed"])
        return [sample for sample in failed if sample["reason"] != UNREADABLE]
