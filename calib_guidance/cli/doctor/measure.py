"""Time, memory and FLOPs of a batch."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from calib_guidance.backend.cost import Machine, Work, WorkCounter
from calib_guidance.backend.counters import FlopCounter, KnownShapes, PeakMemory
from calib_guidance.samplers.base import StepRecord
from calib_guidance.samplers.evaluate import plan_of
from calib_guidance.tasks import GuidedSampling
from calib_guidance.tasks.retry import FaultTolerant

PATIENCE = 20.0  # seconds that one step of each kind may take, and after which nothing is measured twice
_LAPS = 3  # steps of a kind that are timed; the first is a warm-up


class EnoughError(Exception):
    """Every kind of step is measured: the rest of the batch need not be sampled."""


class Meter(L.Callback):
    """Increments of a clock (seconds, or FLOPs) by kind of work, while Lightning runs a batch: a callback and an observer."""

    def __init__(self, module: L.LightningModule, clock: Callable[[], float] | None = None):
        self.module, self.clock = module, clock or self._seconds
        self._enough = 1 if clock else _LAPS  # what is counted is the same in every step of a kind
        self.batch_size = 0  # of the samples, which the task halves until they fit into memory
        self.values: dict[str, Tensor] = {}  # to check
        self.laps: dict[str, list[float]] = defaultdict(list)
        self.times = {"validation batch": 0}  # that a batch of the run does each kind, 1 where not named
        if isinstance(module, GuidedSampling):
            levels = module.sampler.levels(module.denoiser)
            plan = plan_of(module.guidance, levels)
            guided = int((plan.active if plan.runs is None else plan.runs).sum())
            steps = {"guided step": guided, "step": len(levels.times) - guided}
            self.times |= {kind: count * module.sampler.recurrence for kind, count in steps.items()}
            module.context.observers = [self]
        self._deadline = time.perf_counter() + PATIENCE
        self.noted: dict[str, Any] = {}  # by kind, what ``note`` returned at the end of its last lap
        self.note: Callable[[], Any] | None = None
        self.start()

    def _seconds(self) -> float:
        """Seconds, once the device has done its work."""
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)
        return time.perf_counter()

    def start(self, *args: object) -> None:
        self._last = self.clock()

    def lap(self, kind: str) -> None:
        """Attribute the increment since the last call to a kind of work."""
        self.laps[kind].append(self.clock() - self._last)
        if self.note is not None:
            self.noted[kind] = self.note()
        self.start()

    @property
    def late(self) -> bool:
        return time.perf_counter() > self._deadline

    def range(self, kind: str) -> tuple[float, float]:
        """Least and most of one kind of work, after the warm-up."""
        laps = self.laps[kind][1:] or self.laps[kind]
        return min(laps), max(laps)

    @property
    def one_each(self) -> float:
        """The most that one lap of each kind takes."""
        return sum(self.range(kind)[1] for kind in self.laps)

    def total(self) -> tuple[float, float]:
        """Least and most that a batch of the run takes."""
        low, high = (sum(self.times.get(kind, 1) * self.range(kind)[end] for kind in self.laps) for end in (0, 1))
        return low, high

    def __call__(self, record: StepRecord) -> None:
        guided, self.batch_size = record.guided, len(record.y)
        self.lap("step" if guided.aux.logits is None else "guided step")
        named = {"x̂0": guided.prediction.x0} | guided.aux._asdict()
        self.values |= {name: value for name, value in named.items() if value is not None}
        measured = (
            len(self.laps.get(kind, ())) >= min(self._enough, self.times[kind]) for kind in ("guided step", "step")
        )
        if all(measured) or self.late:
            self.values["image"] = self.module.denoiser.decode(guided.prediction.x0)
            self.lap("decoding")
            raise EnoughError

    on_predict_batch_start = on_train_batch_start = on_validation_batch_start = start

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: object) -> None:
        self.lap("decoding" if isinstance(self.module, GuidedSampling) else "denoised batch")
        self.values["image"] = outputs.columns["image"]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        norms = [p.grad.detach().norm() for p in module.parameters() if p.grad is not None]
        self.values["gradient norms"] = torch.stack(norms)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: object) -> None:
        self.lap("training step")
        self.values["loss"] = outputs["loss"]
        trainer.should_stop = self.late

    def on_validation_batch_end(self, *args: object) -> None:
        self.lap("validation batch")


def extrapolate(measured: Mapping[int, tuple[float, float]], size: int) -> tuple[float, float]:
    """Least and most that a batch of ``size`` takes, from those of one or two smaller batches, by their size.

    At most its images cost what each of the largest measured batch costs. At least they cost the slope between the two batches;
    of one batch alone nothing is known but that a larger one takes no less.
    """
    (least, (first, _)), (most, (low, high)) = min(measured.items()), max(measured.items())
    slope = max(low - first, 0.0) / (most - least) if most > least else 0.0
    return low + slope * (size - most), high * size / most


class Count(NamedTuple):
    """What a batch takes, all steps together."""

    flops: float
    peak: int  # bytes beside the weights
    works: list[tuple[int, list[Work]]]  # how often a batch does operators, and which

    def seconds(self, machine: Machine) -> float:
        """The time that the cost model expects of a device."""
        return sum(times * machine.seconds(works) for times, works in self.works)


def count_batch(module: L.LightningModule, batch: dict[str, Tensor], trainer: L.Trainer) -> Count:
    """FLOPs, memory and operators of a batch, of a module on the meta device."""
    module.trainer, plugin, trains = trainer, trainer.precision_plugin, not isinstance(module, FaultTolerant)
    batch = {k: v.to("meta") if k in ("image", "label", "t") else v for k, v in batch.items()}
    context = plugin.train_step_context() if trains else plugin.predict_step_context()
    counting = FlopCounter(), PeakMemory(), WorkCounter()
    with (
        KnownShapes(),
        counting[0] as flops,
        counting[1] as memory,
        counting[2] as works,
        context,
        contextlib.suppress(EnoughError),
    ):
        meter = Meter(module, flops.get_total_flops)
        meter.note = works.take
        if trains:
            module.train()
            module.on_fit_start()
            found = module.configure_optimizers()
            module.training_step(batch, 0).backward()
            (found["optimizer"] if isinstance(found, dict) else found).step()
        else:
            module.attempt(batch, float32=False)
        meter.lap("batch")
    found = [(meter.times.get(kind, 1), works) for kind, works in meter.noted.items()]
    return Count(meter.total()[1], memory.peak, found)
