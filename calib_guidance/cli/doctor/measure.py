"""Time, or FLOPs, of each kind of work in a batch, measured while Lightning runs it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from calib_guidance.samplers.base import StepRecord
from calib_guidance.tasks import GuidedSampling

PATIENCE = 20.0  # seconds after which nothing is measured twice
_LAPS = 3  # steps of a kind that are measured; the first is a warm-up


class EnoughError(Exception):
    """Every kind of step is measured: the rest of the batch need not be sampled."""


class Meter(L.Callback):
    """Increments of a clock by kind of work: a callback, and an observer of samplers.

    Args:
        module: what Lightning runs.
        clock: seconds, or FLOPs, so far.

    Attributes:
        laps: increments by kind of work.
        times: how often a batch of the run does each kind.
        values: tensors to check, by name.
        batch_size: of the samples, which the task halves until they fit into memory.
    """

    def __init__(self, module: L.LightningModule, clock: Callable[[], float]):
        self.module, self.clock, self.values, self.batch_size = module, clock, {}, 0
        self.laps: dict[str, list[float]] = defaultdict(list)
        self.times: dict[str, float] = {"validation batch": 0}
        if isinstance(module, GuidedSampling):
            levels = module.sampler.levels(module.denoiser)
            guided = 0 if module.guidance is None else int(module.guidance.plan(levels).active.sum())
            repeats = module.sampler.recurrence
            self.times |= {"guided step": repeats * guided, "step": repeats * (len(levels.times) - guided)}
            module.context.observe(self)
        self._started = time.perf_counter()
        self.start()

    def start(self, *args: object) -> None:
        self._last = self.clock()

    def lap(self, kind: str) -> None:
        """Attribute the increment since the last call to a kind of work."""
        self.laps[kind].append(self.clock() - self._last)
        self.start()

    @property
    def late(self) -> bool:
        return time.perf_counter() - self._started > PATIENCE

    def total(self) -> tuple[float, float]:
        """Least and most that a batch of the run takes."""
        known = [(self.times.get(kind, 1), self.range(kind)) for kind in self.laps]
        return sum(times * low for times, (low, _) in known), sum(times * high for times, (_, high) in known)

    def range(self, kind: str) -> tuple[float, float]:
        """Least and most of one kind of work, after the warm-up."""
        laps = self.laps[kind][1:] or self.laps[kind]
        return min(laps), max(laps)

    def __call__(self, record: StepRecord) -> None:
        guided, self.batch_size = record.guided, len(record.y)
        self.lap("step" if guided.aux.logits is None else "guided step")
        named = {"x̂0": guided.prediction.x0} | guided.aux._asdict()
        self.values |= {name: value for name, value in named.items() if value is not None}
        missing = [
            kind for kind in ("guided step", "step") if len(self.laps.get(kind, ())) < min(_LAPS, self.times[kind])
        ]
        if not missing or self.late:
            self.start()
            self.values["image"] = self.module.denoiser.decode(record.guided.prediction.x0)
            self.lap("decoding")
            raise EnoughError
        self.start()

    on_predict_batch_start = on_train_batch_start = on_validation_batch_start = start

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: object
    ) -> None:
        self.lap("decoding" if isinstance(self.module, GuidedSampling) else "denoised batch")
        self.values["image"] = outputs["image"]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        gradients = [p.grad.detach() for p in pl_module.parameters() if p.grad is not None]
        self.values["gradient norms"] = torch.stack([gradient.norm() for gradient in gradients])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: object) -> None:
        self.lap("training step")
        self.values["loss"] = outputs["loss"]
        trainer.should_stop = self.late

    def on_validation_batch_end(self, *args: object) -> None:
        self.lap("validation batch")
