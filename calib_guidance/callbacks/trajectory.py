"""What happens along the trajectory: calibration of the classifier and strength of its gradient."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.callbacks.figures import draw_curve
from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.metrics import CalibrationError
from calib_guidance.metrics.levels import Terms
from calib_guidance.samplers import Revisable, StepRecord


class TrajectoryMeasurement(Measurement, Revisable):
    """Watches every step of the sampler."""

    metric: Metric

    @abstractmethod
    def build(self, num_steps: int) -> Metric:
        """The metric for a trajectory of so many steps, of ``sums`` that are not to be synchronised: every rank has all."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            pl_module.check()
            self.t = pl_module.sampler.levels(pl_module.denoiser).times.tolist()
            self.metric = self.build(len(self.t)).to(trainer.strategy.root_device)
            self.noted: list[tuple[int, list[Tensor]]] = []
            pl_module.observers.append(self)

    def __call__(self, record: StepRecord) -> None:
        if (terms := self.terms(record)) is not None:
            self.noted.append((record.i, terms))

    def count(self, rows: slice | Tensor) -> None:
        for i, terms in self.noted:
            self.add(i, [term[rows] for term in terms])
        self.noted.clear()

    @abstractmethod
    def terms(self, record: StepRecord) -> list[Tensor] | None:
        """What is kept of a step until it is known whether the samples are: few numbers for each, ``(N, …)``."""

    @abstractmethod
    def add(self, i: int, terms: list[Tensor]) -> None:
        """Add terms of step ``i`` to the sums."""

    def sums(self) -> dict[str, Tensor]:
        return {"steps": self.metric.sums}

    def reset(self) -> None:
        self.metric.reset()

    def load(self, sums: dict[str, Tensor]) -> None:
        self.metric.sums = sums["steps"].to(self.metric.sums)


class TrajectoryCalibration(TrajectoryMeasurement):
    """ECE_t of the guiding classifier on what it is shown, against the class being sampled, and its mean, the integral ECE.

    Args:
        num_bins: bins of the ECE.
    """

    def __init__(self, num_bins: int = 15):
        self.num_bins = num_bins

    def build(self, num_steps: int) -> Metric:
        return CalibrationError(self.num_bins, num_levels=num_steps, sync_on_compute=False)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        if record.guided.logits is None:
            return None
        terms = self.metric.terms(record.guided.logits, record.y)
        return [terms.cell, *terms.values]

    def add(self, i: int, terms: list[Tensor]) -> None:
        cell, *values = terms
        self.metric.add(Terms(cell, tuple(values)), i)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        ece = compute(self.metric, trainer).by_level.cpu()
        if ece.isnan().all():  # no classifier ran
            self.ece = None
            return {}
        self.ece = ece
        return {"integral_ece": float(ece.nanmean()), "ece_t": {"t": self.t, "ece": ece.tolist()}}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if self.ece is None:
            return []
        mean = float(self.ece.nanmean())
        return [draw_curve(self.t, self.ece.tolist(), folder / "ece_t.png", r"ECE$_t$ of the classifier", average=mean)]


class StepMoments(Metric):
    """Mean and standard deviation of a quantity at each step, from its count, sum and sum of squares.

    Args:
        num_steps: N.
    """

    full_state_update = False

    def __init__(self, num_steps: int, **kwargs: object):
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(num_steps, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, step: int, values: Tensor) -> None:
        """Count the values ``(N,)`` of a batch at one step."""
        values = values.double()
        self.sums[step] += torch.stack([torch.ones_like(values), values, values.square()]).sum(1)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at each step, ``(num_steps,)`` each; NaN where nothing was counted."""
        count, total, squares = self.sums.unbind(1)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


class GradientNorm(TrajectoryMeasurement):
    """‖∇S‖ over the trajectory, mean and standard deviation over samples: the vanishing that the papers argue from."""

    def build(self, num_steps: int) -> Metric:
        return StepMoments(num_steps, sync_on_compute=False)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        gradient = record.guided.step_gradient
        return None if gradient is None else [gradient.flatten(1).norm(dim=1).double()]

    def add(self, i: int, terms: list[Tensor]) -> None:
        self.metric.update(i, *terms)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        self.mean, self.deviation = (value.cpu() for value in compute(self.metric, trainer))
        if self.mean.isnan().all():
            return {}
        return {"gradient_norm_t": {"t": self.t, "mean": self.mean.tolist(), "sd": self.deviation.tolist()}}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if self.mean.isnan().all():
            return []
        path, label = folder / "gradient_norm.png", r"$\|\nabla S\|$  (mean ± sd over samples)"
        return [draw_curve(self.t, self.mean.tolist(), path, label, self.deviation.tolist())]
