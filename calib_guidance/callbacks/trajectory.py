"""What happens along the trajectory: calibration of the classifier and strength of its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.callbacks.figures import draw_curve
from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.metrics import CalibrationError
from calib_guidance.samplers import StepRecord


class TrajectoryMeasurement(Measurement, ABC):
    """Watches every step of the sampler."""

    metric: Metric

    @abstractmethod
    def build(self, num_steps: int) -> Metric:
        """The metric for a trajectory of so many steps."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            pl_module.check()
            self.t = pl_module.sampler.levels(pl_module.denoiser).times.tolist()
            self.metric = self.build(len(self.t)).to(trainer.strategy.root_device)
            pl_module.observers.append(self.observe)

    @abstractmethod
    def observe(self, record: StepRecord) -> None:
        """Count one step."""


class TrajectoryCalibration(TrajectoryMeasurement):
    """ECE_t of the guiding classifier on what it is shown, against the class being sampled, and its mean, the integral ECE.

    Args:
        num_bins: bins of the ECE.
    """

    def __init__(self, num_bins: int = 15):
        self.num_bins = num_bins

    def build(self, num_steps: int) -> Metric:
        return CalibrationError(self.num_bins, num_levels=num_steps)

    def observe(self, record: StepRecord) -> None:
        if record.guided.logits is not None:
            self.metric.update(record.guided.logits, record.y, record.i)

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
        return StepMoments(num_steps)

    def observe(self, record: StepRecord) -> None:
        if record.guided.step_gradient is not None:
            self.metric.update(record.i, record.guided.step_gradient.flatten(1).norm(dim=1))

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
