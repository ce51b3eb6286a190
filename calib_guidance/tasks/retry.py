"""Sampling that goes on through what fails on the way: numbers that are not finite, and memory that does not suffice."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from calib_guidance.backend.precision import HALVES
from calib_guidance.errors import OutOfMemoryError
from calib_guidance.samplers.records import BufferedObserver, Observer, StepRecord

log = logging.getLogger(__name__)


class LeftOut(NamedTuple):
    """A sample that could not be made.

    Attributes:
        index: of the sample.
        step: t of the first step after which it was not finite; None where it became so when it was decoded.
        reason: in words.
    """

    index: int
    step: float | None
    reason: str


class FirstNonFinite:
    """An observer: the step after which each sample was first not finite.

    Attributes:
        t: ``(N,)`` float64 on the device, NaN for samples that were always finite; None before the first step.
    """

    def __init__(self) -> None:
        self.t: Tensor | None = None

    def __call__(self, record: StepRecord) -> None:
        # A sum is finite where all its terms are; nothing of it is read on the host.
        finite = record.x_next.sum(dim=(1, 2, 3)).isfinite()
        if self.t is None:
            self.t = torch.full(finite.shape, torch.nan, dtype=torch.float64, device=finite.device)
        self.t = torch.where(finite | ~self.t.isnan(), self.t, float(record.t))


class Attempt(NamedTuple):
    """What sampling gave.

    Attributes:
        columns: ``image`` ``(N, C, H, W)`` and whatever is written beside it, ``(N,)`` each.
        first_wrong: ``(N,)`` float64 t of the first step that was not finite, NaN where all were.
    """

    columns: dict[str, Tensor]
    first_wrong: Tensor


@contextlib.contextmanager
def in_float32(*modules: nn.Module) -> Iterator[None]:
    """Run modules in float32: weights, the number formats that they state as ``torch.dtype``, no autocast, nothing compiled.

    Afterwards they are what they were: numbers in half precision survive the way there and back.
    """
    parts = [part for module in modules for part in module.modules()]
    held = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
    tensors = {id(t): (t, t.dtype) for t in held if t is not None and t.dtype in HALVES}
    formats = [(p, name, v) for p in parts for name, v in vars(p).items() if isinstance(v, torch.dtype) and v in HALVES]
    try:
        for tensor, _ in tensors.values():
            tensor.data = tensor.data.float()
        for part, name, _ in formats:
            setattr(part, name, torch.float32)
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for tensor, dtype in tensors.values():
            tensor.data = tensor.data.to(dtype)
        for part, name, dtype in formats:
            setattr(part, name, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left, whichever library says so."""
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class FaultTolerant(L.LightningModule, ABC):
    """A predict step that survives faults of single samples and of the memory.

    - A sample that is not finite is made once more with everything in float32, its tilting group with it. One that is not
      finite then either is named in ``left_out``; its row of the image is not to be written.
    - A batch that does not fit into memory is halved until it does, and later ones are cut alike. Tilting groups stay whole, so
      that samples differ by no more than rounding.

    Where a network is compiled, which takes minutes for each new shape, a short batch is filled up to the size of those before it
    with repetitions of its own requests. What becomes of these is dropped.

    Observers that are :class:`~calib_guidance.samplers.base.BufferedObserver` count each sample once, as it was kept.

    Attributes:
        observers: of the trajectory.
        left_out: samples of the last batch that could not be made.
        group_size: samples that depend on each other, neighbours by index; batches hold whole groups.
        in_hand: indices of the samples that are being made, row by row, for observers of single samples.
    """

    group_size: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Observer] = []
        self.left_out: list[LeftOut] = []
        self.in_hand: list[int] = []
        self._fits: dict[bool, int] = {}  # samples at a time, by whether in float32; absent while any number does
        self._largest = 0  # batch so far

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What samples are made with, by name."""

    @abstractmethod
    def attempt(self, batch: dict[str, Tensor], float32: bool) -> Attempt:
        """Make the samples of requests ``{index, label, seed}``, ``(N,)`` each, where asked with all networks in float32."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``image`` ``(N, C, H, W)`` in [-1, 1] and further columns ``(N,)`` for requests ``{index, label, seed}``.

        Raises:
            OutOfMemoryError: not even one group of samples fits.
        """
        self.left_out = []
        self._largest = max(self._largest, len(batch["index"]))
        columns, wrong = self._in_parts(batch, float32=False)
        if wrong:
            torn = self._groups(wrong)
            self._again(
                batch, columns, wrong, [row for row in range(len(batch["index"])) if row // self.group_size in torn]
            )
        return columns

    def _again(
        self, batch: dict[str, Tensor], columns: dict[str, Tensor], wrong: dict[int, float | None], rows: list[int]
    ) -> None:
        """Put what float32 makes of ``rows`` into the columns, and name what is ``wrong`` then too."""
        numbers = batch["index"].tolist()
        log.warning(f"not finite, sampling once more in float32: {', '.join(str(numbers[row]) for row in rows)}")
        place, reason = torch.tensor(rows, device=self.device), "not finite, in float32 either"
        try:
            again, found = self._in_parts({name: column[place] for name, column in batch.items()}, float32=True)
            wrong = {rows[row]: step for row, step in found.items()}
        except OutOfMemoryError:  # which must not keep the run from ever ending
            again, reason = {}, "not finite, and float32 does not fit into the memory"
        for name, column in again.items():
            dtype = torch.promote_types(columns[name].dtype, column.dtype)
            columns[name] = columns[name].to(dtype).index_copy(0, place, column.to(dtype))
        self.left_out = [LeftOut(numbers[row], step, reason) for row, step in wrong.items()]
        if wrong:
            log.warning(f"{reason}, left out: {', '.join(str(sample.index) for sample in self.left_out)}")

    def _groups(self, rows: Iterable[int]) -> set[int]:
        return {row // self.group_size for row in rows}

    def _in_parts(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], dict[int, float | None]]:
        """All columns, made of as many rows at a time as fit, and the rows that are not finite with the step of it."""
        size, start, parts, wrong = len(batch["index"]), 0, [], {}
        before = self._fits.get(float32, size)
        while start < size:
            rows = slice(start, min(start + self._fits.get(float32, size), size))
            count = rows.stop - rows.start
            filled = self._filled({name: column[rows] for name, column in batch.items()}, float32)
            attempt = self._try(filled, float32)
            if attempt is None:
                self._halve(len(filled["index"]), float32)
                continue
            attempt = Attempt({k: v[:count] for k, v in attempt.columns.items()}, attempt.first_wrong[:count])
            found = self._not_finite(attempt)
            torn = self._groups(found) if not float32 else set()
            kept = [r for r in range(count) if r not in found and r // self.group_size not in torn]
            self._count(slice(count) if not found else torch.tensor(kept, dtype=torch.long, device=self.device))
            wrong |= {start + row: step for row, step in found.items()}
            parts.append(attempt.columns)
            start = rows.stop
        if (fits := self._fits.get(float32, size)) < before:
            log.warning(
                f"out of memory with {before} samples at a time on {self.device}{' in float32' if float32 else ''}: going on "
                f"with {fits}, of the same batches"
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, wrong

    def _filled(self, batch: dict[str, Tensor], float32: bool) -> dict[str, Tensor]:
        """The batch, at the one size that networks are compiled for; in float32 nothing is compiled."""
        size, count = min(self._largest, self._fits.get(False, self._largest)), len(batch["index"])
        parts = (part for network in self.networks().values() for part in network.modules())
        if float32 or count >= size or not any(getattr(part, "is_compiled", False) for part in parts):
            return batch
        rows = torch.arange(size, device=batch["index"].device) % count  # groups are whole, and so they stay
        return {name: column[rows] for name, column in batch.items()}

    def _try(self, batch: dict[str, Tensor], float32: bool) -> Attempt | None:
        """None where the memory does not suffice; the error's frames, and all that they hold, are gone then."""
        self.in_hand = batch["index"].tolist()
        try:
            return self.attempt(batch, float32)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._count(slice(0))
        return None

    def _halve(self, size: int, float32: bool) -> None:
        groups = size // self.group_size
        if groups <= 1:
            smallest = "one sample" if size == 1 else f"one group of {size} samples, which the score tilts together,"
            raise OutOfMemoryError(
                f"{smallest} does not fit into the memory of {self.device}{' in float32' if float32 else ''}: use a device with "
                "more, a network or classifier in half precision (dtype), or guidance without a backward pass through the "
                "denoiser (classifier_input: x0). What is written stays, and the same command goes on from there"
            )
        self._fits[float32] = (groups + 1) // 2 * self.group_size
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _count(self, rows: slice | Tensor) -> None:
        for observer in self.observers:
            if isinstance(observer, BufferedObserver):
                observer.count(rows)

    @staticmethod
    def _not_finite(attempt: Attempt) -> dict[int, float | None]:
        """Rows that are not finite, and the step after which they were not: the one time that the host waits for the device."""
        finite = attempt.columns["image"].sum(dim=(1, 2, 3)).isfinite()
        found: dict[int, float | None] = {}
        for row, (whole, t) in enumerate(torch.stack([finite.double(), attempt.first_wrong]).t().tolist()):
            if not math.isnan(t):
                found[row] = int(t) if t == int(t) else t
            elif not whole:
                found[row] = None
        return found
