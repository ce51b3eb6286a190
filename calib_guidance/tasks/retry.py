"""Sampling that survives failures of single samples (values that are not finite) and a full device memory."""

import contextlib
import gc
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from calib_guidance.backend.compilation import eager
from calib_guidance.backend.precision import HALVES
from calib_guidance.data.requests import RequestData
from calib_guidance.errors import OutOfMemoryError
from calib_guidance.runs.context import SamplingContext
from calib_guidance.samplers.base import StepRecord

log = logging.getLogger(__name__)


class Samples(NamedTuple):
    """Result of a predict step."""

    columns: dict[str, Tensor]  # image (N, C, H, W) in [-1, 1] and others (N,), with rows for failed samples too
    failed: list[dict[str, Any]]  # {index, step, reason} of samples whose rows must not be used, see _retry


class FirstNonFinite:
    """Observer that keeps the step after which each sample was first not finite.

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


@contextlib.contextmanager
def in_float32(*modules: nn.Module) -> Iterator[None]:
    """Run modules in float32: weights, the number formats that they hold as ``torch.dtype``, no autocast, nothing compiled.

    Afterwards they are restored exactly: float32 holds every number in half precision.
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
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), eager():
            yield
    finally:
        for tensor, dtype in tensors.values():
            tensor.data = tensor.data.to(dtype)
        for part, name, dtype in formats:
            setattr(part, name, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left, whichever library raised the error."""
    messages = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    )


class FaultTolerant(L.LightningModule, ABC):
    """Lightning module whose predict step survives failed samples and a full memory.

    - A sample that is not finite is sampled again with everything in float32, its tilting group with it. A sample that is not
      finite then is a failed sample.
    - A batch that does not fit into memory is halved until it does, and so are later batches. Tilting groups are not cut, so
      samples differ by rounding only.

    Compiling a network takes minutes for each new shape. A batch that is shorter than those before it is therefore filled with
    repetitions of its own requests, whose samples are dropped.

    Each :class:`~calib_guidance.samplers.base.BufferedObserver` counts every sample once, as it was kept.
    """

    group_size: int = 1  # samples that depend on each other, neighbors by index; batches hold complete groups

    def __init__(self) -> None:
        super().__init__()
        self.context = SamplingContext()  # shared with the loader, the writer and the measurements
        self._fits: dict[bool, int] = {}  # samples at a time, by whether in float32; absent while any number does
        self._largest = 0  # batch so far
        self.num_done = 0  # samples of the batches before

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigurationError where the parts of this run cannot go together. Nothing is sampled or written here."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What samples are made with, by name."""

    @abstractmethod
    def attempt(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Sample requests ``{index, label, seed}``, ``(N,)`` each, on request with all networks in float32.

        Returns:
            Columns, ``image`` ``(N, C, H, W)`` and others ``(N,)``; and ``(N,)`` float64 t of the first step that was not finite,
            NaN where all were.
        """

    def evaluate_once(self) -> None:
        """Do once, for the fewest samples that can be made, what a batch repeats: the memory that this takes is measured."""

    def configure_run(self, configuration: Mapping[str, Any]) -> None:
        """Take the resolved configuration, from the command line."""
        self.context.configuration = configuration

    def give_num_classes(self, requests: RequestData, num_classes: int | None) -> None:
        """Let the data module take the model's number of classes; the run is known by the number, wherever it was stated."""
        requests.take_num_classes(num_classes)
        if self.context.configuration is not None:
            self.context.configuration["data"].setdefault("init_args", {})["num_classes"] = requests.num_classes

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Samples:
        """Sample requests ``{index, label, seed}``; ``shard`` is the :class:`~calib_guidance.runs.context.ShardPart`."""
        requests = {name: column for name, column in batch.items() if name != "shard"}
        self._largest = max(self._largest, len(requests["index"]))
        columns, nonfinite = self._in_parts(requests, float32=False)
        self.num_done += len(requests["index"])
        self.context.progress(self.num_done)
        return self._retry(requests, columns, nonfinite) if nonfinite else Samples(columns, [])

    def _retry(
        self, requests: dict[str, Tensor], columns: dict[str, Tensor], nonfinite: dict[int, float | None]
    ) -> Samples:
        """Sample the groups of the ``nonfinite`` rows again in float32; their step is None if decoding made them so."""
        indices, groups = requests["index"].tolist(), {row // self.group_size for row in nonfinite}
        rows = [row for row in range(len(indices)) if row // self.group_size in groups]
        log.warning(f"not finite, sampling again in float32: {', '.join(str(indices[row]) for row in rows)}")
        place, reason = torch.tensor(rows, device=self.device), "not finite, in float32 either"
        try:
            again, found = self._in_parts({name: column[place] for name, column in requests.items()}, float32=True)
            nonfinite = {rows[row]: step for row, step in found.items()}
        except OutOfMemoryError:  # which must not keep the run from ever ending
            again, reason = {}, "not finite, and float32 does not fit into the memory"
        for name, column in again.items():
            dtype = torch.promote_types(columns[name].dtype, column.dtype)
            columns[name] = columns[name].to(dtype).index_copy(0, place, column.to(dtype))
        failed = [{"index": indices[row], "step": step, "reason": reason} for row, step in nonfinite.items()]
        if failed:
            log.warning(f"failed samples, {reason}: {', '.join(str(sample['index']) for sample in failed)}")
        return Samples(columns, failed)

    def _in_parts(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], dict[int, float | None]]:
        """All columns, made of as many rows at a time as fit, and the rows that are not finite with the step of it."""
        size, start, parts, nonfinite = len(batch["index"]), 0, [], {}
        before = self._fits.get(float32, size)
        while start < size:
            count = min(self._fits.get(float32, size), size - start)
            rows = self._filled({name: column[start : start + count] for name, column in batch.items()}, float32)
            if (made := self._try(rows, float32)) is None:
                continue
            columns = {name: column[:count] for name, column in made[0].items()}
            found = self._nonfinite_rows(columns["image"], made[1][:count])
            again = set() if float32 else {row // self.group_size for row in found}
            kept = [r for r in range(count) if r not in found and r // self.group_size not in again]
            self.context.count(slice(count) if not found else torch.tensor(kept, dtype=torch.long, device=self.device))
            nonfinite |= {start + row: step for row, step in found.items()}
            parts.append(columns)
            start += count
        if (fits := self._fits.get(float32, size)) < before:
            log.warning(
                f"out of memory with {before} samples at a time on {self.device}{' in float32' if float32 else ''}: "
                f"continuing with {fits} at a time, of the same batches"
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, nonfinite

    def _filled(self, batch: dict[str, Tensor], float32: bool) -> dict[str, Tensor]:
        """The batch at the one size that networks are compiled for; in float32 nothing is compiled."""
        size, count = min(self._largest, self._fits.get(False, self._largest)), len(batch["index"])
        parts = (part for network in self.networks().values() for part in network.modules())
        if float32 or count >= size or not any(getattr(part, "is_compiled", False) for part in parts):
            return batch
        rows = torch.arange(size, device=batch["index"].device) % count  # groups stay complete
        return {name: column[rows] for name, column in batch.items()}

    def _try(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], Tensor] | None:
        """None if memory does not suffice, and half as many samples are to be tried."""
        self.context.indices = batch["index"].tolist()
        try:
            return self.attempt(batch, float32)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The frames of the error, and all that they hold, are gone now.
        self.context.count(slice(0))
        size = len(batch["index"])
        groups = size // self.group_size
        if groups <= 1:
            smallest = "one sample" if size == 1 else f"one group of {size} samples, which the score tilts together,"
            raise OutOfMemoryError(
                f"{smallest} does not fit into the memory of {self.device}{' in float32' if float32 else ''}: use a device with "
                "more, a network or classifier in half precision (dtype), or guidance without a backward pass through the "
                "denoiser (classifier_input: x0). Complete shards are kept; re-run to resume"
            )
        self._fits[float32] = (groups + 1) // 2 * self.group_size
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        return None

    @staticmethod
    def _nonfinite_rows(images: Tensor, first_wrong: Tensor) -> dict[int, float | None]:
        """Rows that are not finite and the step after which: the one time that the host waits for the device."""
        finite = images.sum(dim=(1, 2, 3)).isfinite()
        found: dict[int, float | None] = {}
        for row, (is_finite, t) in enumerate(torch.stack([finite.double(), first_wrong]).t().tolist()):
            if not math.isnan(t):
                found[row] = int(t) if t == int(t) else t
            elif not is_finite:
                found[row] = None
        return found
