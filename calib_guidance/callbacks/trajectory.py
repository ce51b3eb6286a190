"""What happens along the trajectory: calibration of the classifier and strength of its gradient."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.guidance import Guidance, GuidanceSchedule
from calib_guidance.metrics import CalibrationError, calibration_error_from_bins, jackknife_std
from calib_guidance.metrics.moments import StepMoments
from calib_guidance.plots import Series, curves, guidance_schedule, reliability, strength
from calib_guidance.samplers import DDPM, BufferedObserver, Sampler, StepRecord

_RANGES = 5  # of t, for reliability diagrams


class TrajectoryMeasurement(Measurement, BufferedObserver):
    """A metric of every step of the sampler; mean and standard deviation of a value unless a subclass says otherwise."""

    metric: Metric
    blocks: Tensor | None = None  # its sums, of blocks of samples

    def build(self, num_steps: int) -> Metric:
        """The metric for a trajectory of so many steps, of ``sums`` that are not to be synchronized: every rank has all."""
        return StepMoments(num_steps, sync_on_compute=False)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.levels = pl_module.sampler.levels(pl_module.denoiser)
        self.t = self.levels.times.tolist()
        self.metric = self.build(len(self.t)).to(trainer.strategy.root_device)
        self.noted: list[tuple[int, list[Tensor]]] = []
        self.context.observe(self)

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

    def add(self, i: int, terms: list[Tensor]) -> None:
        """Add terms of step ``i`` to the sums."""
        self.metric.update(i, *terms)

    def sums(self) -> dict[str, Tensor]:
        return {"steps": self.metric.sums}

    def reset(self) -> None:
        self.metric.reset()

    def load(self, sums: dict[str, Tensor]) -> None:
        self.metric.sums = sums["steps"].to(self.metric.sums)
        self.blocks = None

    def load_blocks(self, sums: dict[str, Tensor]) -> None:
        self.blocks = sums["steps"].to(self.metric.sums)


class TrajectoryCalibration(TrajectoryMeasurement):
    """ECE_t of the guiding classifier on what it is shown, against the class being sampled, and its mean, the integral ECE.

    Also its reliability diagrams, over five ranges of t. The standard error of both is over samples, from the sums of blocks
    of shards, where there are five or more: the steps of one trajectory are not independent, its samples are. Of a classifier
    that is calibrated as well as so many samples can tell, the jackknife makes it too large (by 40 % in simulations), as the
    error has no derivative at 0.

    Args:
        num_bins: bins of the ECE.
    """

    def __init__(self, num_bins: int = 15):
        self.num_bins = num_bins

    def build(self, num_steps: int) -> Metric:
        return CalibrationError(self.num_bins, num_levels=num_steps, sync_on_compute=False)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        if record.guided.aux.logits is None:
            return None
        return list(self.metric.terms(record.guided.aux.logits, record.y))

    def add(self, i: int, terms: list[Tensor]) -> None:
        self.metric.add(tuple(terms), i)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        ece, self.ece_t = compute(self.metric, trainer).by_level.cpu(), None
        if ece.isnan().all():  # no classifier ran
            return {}
        integral, uncertainty = float(ece.nanmean()), {}
        self.ece_t, self.reliability = {"t": self.t, "ece": ece.tolist()}, self._by_range()
        if self.blocks is not None:
            without = calibration_error_from_bins(self.metric.sums - self.blocks).cpu()
            of = f"jackknife over {len(self.blocks)} blocks of samples"
            std = jackknife_std(without.nanmean(1))
            uncertainty["integral_ece"] = METRICS["integral_ece"].uncertainty(integral, std, of)
            self.ece_t |= {"std": jackknife_std(without).tolist(), "of": of}
        return {
            "integral_ece": integral,
            "uncertainty": uncertainty,
            "ece_t": self.ece_t,
            "reliability": self.reliability,
        }

    def _by_range(self) -> dict[str, list]:
        """Bins of each range of t: ``levels`` are their names, ``bins`` ``(ranges, num_bins, 3)`` count, confidence, correct."""
        edges = [round(k * self.levels.num_train_steps / _RANGES) for k in range(_RANGES + 1)]
        ranges = list(itertools.pairwise(edges))
        t = torch.tensor(self.t).round()
        sums = self.metric.sums.cpu()
        bins = [sums[(low <= t) & (t < high)].sum(0).tolist() for low, high in ranges]
        return {"levels": [f"t = {low}–{high - 1}" for low, high in ranges], "bins": bins}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if self.ece_t is None:
            return []
        std = self.ece_t.get("std")
        series = [Series("", self.t, self.ece_t["ece"], std)]
        label = r"ECE$_t$ of the classifier" + ("" if std is None else "  (± std)")
        return [
            *curves(series, folder / "ece_t", label, averages=True),
            *reliability(self.reliability["bins"], self.reliability["levels"], folder / "reliability"),
        ]


def _strengths(guidance: Guidance | None, sampler: Sampler, levels: NoiseLevels) -> dict[str, Any] | None:
    """What ∇S is multiplied by at each step, with the sine factor and without, see :func:`~calib_guidance.plots.strength`.

    None without guidance, and where its parts enter in ways that cannot be compared.
    """
    if guidance is None or not any(guidance.plan(levels).active):
        return None
    parts = guidance.parts()
    if any(part.apply_to == "step" for part in parts):
        return None
    in_score = "variance" if isinstance(sampler, DDPM) else "noise"
    units = {{"score": in_score, "sample": "shift", "cfg_residual": "difference"}[part.apply_to] for part in parts}
    if len(units) > 1:
        return None
    unit = units.pop()

    def together(schedules: list[GuidanceSchedule]) -> list[float]:
        each = [strength(s, levels, unit, part.scale) for s, part in zip(schedules, parts, strict=True)]
        return np.where(guidance.is_early(levels), *each).tolist() if len(each) > 1 else each[0].tolist()

    schedules = [part.schedule for part in parts]
    limits = ("interval", "sigma_interval", "every", "step_interval", "flow_interval")
    plain = [GuidanceSchedule(0.0, **{name: getattr(s, name) for name in limits}) for s in schedules]
    factors = ", ".join(f"{gamma:g}" for gamma in sorted({s.gamma for s in schedules}))
    curves = {"without sine factor": together(plain)}
    if any(s.gamma for s in schedules):
        curves[f"with sine factor, $\\gamma$ = {factors}"] = together(schedules)
    return {"t": levels.times.tolist(), "unit": unit, "strength": curves}


class GradientNorm(TrajectoryMeasurement):
    """‖∇S‖ over the trajectory, mean and standard deviation over samples: the vanishing that the papers argue from.

    Also what it is multiplied by, the guidance schedule (arXiv 2310.11311, Figure 5), which follows from the configuration.
    """

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().begin(trainer, pl_module)
        self.schedule = _strengths(pl_module.guidance, pl_module.sampler, self.levels)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        gradient = record.guided.aux.gradient
        return None if gradient is None else [gradient.flatten(1).norm(dim=1).double()]

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        mean, deviation = (value.cpu() for value in compute(self.metric, trainer))
        self.norm = None if mean.isnan().all() else {"t": self.t, "mean": mean.tolist(), "std": deviation.tolist()}
        if self.norm is None:
            return {}
        return {"gradient_norm_t": self.norm, **({"guidance_schedule": self.schedule} if self.schedule else {})}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if self.norm is None:
            return []
        label = "$\\|\\nabla S\\|$\n(mean ± std over samples)"
        paths = curves([Series("", *self.norm.values())], folder / "gradient_norm", label)
        if self.schedule:
            t, unit, strengths = (self.schedule[key] for key in ("t", "unit", "strength"))
            paths += guidance_schedule(t, strengths, folder / "guidance_schedule", unit)
        return paths
