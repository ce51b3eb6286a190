"""What happens along the trajectory: calibration of the classifier, strength of its gradient, fit to the prompts."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks.measurement import Measurement, decoded_shape, find_class_names, title_of
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.guidance import Guidance, GuidanceSchedule
from calib_guidance.metrics import CalibrationError, calibration_error_from_bins, jackknife_std
from calib_guidance.metrics.moments import StepMoments
from calib_guidance.plots import (
    Series,
    animation,
    curves,
    guidance_schedule,
    real_of_classes,
    reliability,
    strength,
    strips,
)
from calib_guidance.runs.store import REAL_IMAGES
from calib_guidance.samplers import DDPM, BufferedObserver, Sampler, StepRecord

_RANGES = 5  # of t, for reliability diagrams
# Of each sample in TrajectoryStrips. Of no sample, a column of the type alone.
_COLUMNS = {"index": torch.long, "label": torch.long, "frames": torch.uint8, "gradient": torch.float32}


class TrajectoryMeasurement(Measurement, BufferedObserver):
    """A metric of every step of the sampler; mean and standard deviation of a value unless a subclass says otherwise."""

    blocks: Tensor | None = None  # sums of blocks of samples

    def build(self, num_steps: int) -> dict[str, Metric]:
        """The metric of ``steps``, and others, with ``sums`` that are not to be synchronized: every rank has all."""
        return {"steps": StepMoments(num_steps, sync_on_compute=False)}

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.levels = pl_module.sampler.levels(pl_module.denoiser)
        self.t = self.levels.times.tolist()
        device = trainer.strategy.root_device
        self.metrics = {name: metric.to(device) for name, metric in self.build(len(self.t)).items()}
        self.metric = self.metrics["steps"]
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
        return {name: metric.sums for name, metric in self.metrics.items()}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()

    def load(self, sums: dict[str, Tensor]) -> None:
        for name, metric in self.metrics.items():
            metric.sums = sums[name].to(metric.sums)
        self.blocks = None

    def load_blocks(self, sums: dict[str, Tensor]) -> None:
        self.blocks = sums["steps"].to(self.metric.sums)

    @torch.no_grad()
    def computed(self, name: str = "steps") -> Any:
        """A metric of the loaded sums."""
        self.metrics[name]._update_count = 1  # else torchmetrics warns of a rank without samples
        return self.metrics[name].compute()

    def moments(self, every: int = 1) -> dict[str, list[float]] | None:
        """Mean and standard deviation over samples at every k-th step; None where nothing was measured."""
        mean, std = self.computed()[:, ::every].tolist()
        return None if all(map(math.isnan, mean)) else {"t": self.t[::every], "mean": mean, "std": std}


class TrajectoryCalibration(TrajectoryMeasurement):
    """Calibration along the trajectory: ECE_t of the guiding classifier against the class being sampled, and the integral ECE.

    Also its reliability diagrams, over five ranges of t. The standard error of both is a jackknife over blocks of shards, where
    there are five or more: the steps of one trajectory are not independent, its samples are. It is too large (by 40 % in
    simulations) for a classifier that is calibrated as well as so many samples can tell: the error has no derivative at 0.

    Args:
        num_bins: bins of the ECE.
    """

    def __init__(self, num_bins: int = 15):
        self.num_bins = num_bins

    def build(self, num_steps: int) -> dict[str, Metric]:
        return {"steps": CalibrationError(self.num_bins, num_levels=num_steps, sync_on_compute=False)}

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        if record.guided.aux.logits is None:
            return None
        cell, *values = self.metric.terms(record.guided.aux.logits, record.y)
        if (fresh := record.guided.aux.fresh) is not None:  # what a batch computes beyond that is of no sample
            values = [value * fresh[:, None] for value in values]
        return [cell, *values]

    def add(self, i: int, terms: list[Tensor]) -> None:
        self.metric.add(tuple(terms), i)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        ece, sums = self.computed().by_level.cpu(), self.metric.sums.cpu()
        if ece.isnan().all():  # no classifier ran
            return {}
        integral, uncertainty, ece_t = float(ece.nanmean()), {}, {"t": self.t, "ece": ece.tolist()}
        if self.blocks is not None:
            without = calibration_error_from_bins(self.metric.sums - self.blocks).cpu()
            of = f"jackknife over {len(self.blocks)} blocks of samples"
            std = jackknife_std(without.nanmean(1))
            uncertainty["integral_ece"] = METRICS["integral_ece"].uncertainty(integral, std, of)
            ece_t |= {"std": jackknife_std(without).tolist(), "of": of}
        edges = [round(k * self.levels.num_train_steps / _RANGES) for k in range(_RANGES + 1)]
        ranges, t = list(itertools.pairwise(edges)), torch.tensor(self.t).round()
        # (ranges, num_bins, 3): count, summed confidence, number correct.
        bins = [sums[(low <= t) & (t < high)].sum(0).tolist() for low, high in ranges]
        by_range = {"levels": [f"t = {low}–{high - 1}" for low, high in ranges], "bins": bins}
        return {"integral_ece": integral, "uncertainty": uncertainty, "ece_t": ece_t, "reliability": by_range}

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        if (ece_t := results.get("ece_t")) is None:
            return []
        label = r"ECE$_t$ of the classifier" + ("  (± std)" if "std" in ece_t else "")
        series, by_range = Series("", ece_t["t"], ece_t["ece"], ece_t.get("std")), results["reliability"]
        paths = curves([series], folder / "ece_t", label, averages=True)
        return [*paths, *reliability(by_range["bins"], by_range["levels"], folder / "reliability")]


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
    """Gradient norm ‖∇S‖ along the trajectory, mean and standard deviation over samples. It shows vanishing gradients.

    Also ``gradients_per_sample``, the mean number of steps at which a sample's gradient was computed and not reused, and the
    guidance schedule, the factor of ∇S (arXiv 2310.11311, Figure 5). The schedule follows from the configuration.
    """

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().begin(trainer, pl_module)
        self.schedule = _strengths(pl_module.guidance, pl_module.sampler, self.levels)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        _, gradient, fresh = record.guided.aux
        if gradient is None:
            return None
        norm = gradient.flatten(1).norm(dim=1).double()
        return [norm, torch.ones_like(norm) if fresh is None else fresh.double()]

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        if (norm := self.moments()) is None:
            return {}
        counts = self.metric.sums[:, 0]
        found = {"gradient_norm_t": norm, "gradients_per_sample": float(counts.sum() / counts.max())}
        return found | ({"guidance_schedule": self.schedule} if self.schedule else {})

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        paths: list[Path] = []
        if norm := results.get("gradient_norm_t"):
            label = "$\\|\\nabla S\\|$\n(mean ± std over samples)"
            paths += curves([Series("", *norm.values())], folder / "gradient_norm", label)
        if schedule := results.get("guidance_schedule"):
            t, unit, strengths = (schedule[key] for key in ("t", "unit", "strength"))
            paths += guidance_schedule(t, strengths, folder / "guidance_schedule", unit)
        return paths


class TrajectoryCLIPScore(TrajectoryMeasurement):
    """CLIP score of x̂0 at every step, and of the finished samples (arXiv 2310.11311, Figure 7).

    It is the cosine between the image and the requested prompt. This CLIP model is not the one that guides, and runs with other
    schedules or without guidance can be compared. Each measured step costs a forward pass of CLIP and, in latent models, a
    decoding of x̂0. The seconds per image include both.

    Args:
        clip: with one prompt for each class of the requests; frozen here.
        every: k ≥ 1, to measure at every k-th step, counted from the last one.
    """

    def __init__(self, clip: CLIPClassifier, every: int = 1):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.clip, self.every = clip.freeze(), every

    def build(self, num_steps: int) -> dict[str, Metric]:
        return super().build(num_steps) | {"final": StepMoments(1, sync_on_compute=False)}

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().begin(trainer, pl_module)
        classes, prompts = trainer.datamodule.num_classes, self.clip.num_classes
        if classes != prompts:
            raise ConfigurationError(
                f"the requests have {classes} classes, the CLIP score {prompts} prompts: give it one for each class"
            )
        self.clip.to(trainer.strategy.root_device)
        self.decode = pl_module.denoiser.decode
        try:
            self.clip.check_image(decoded_shape(pl_module))
        except ValueError as error:
            raise ConfigurationError(f"the CLIP score cannot be taken: {error}") from error

    def _similarity(self, images: Tensor, y: Tensor) -> Tensor:
        """``(N,)`` cosine of each image, clipped as it is when written, to its prompt."""
        with torch.no_grad():
            return self.clip.similarity(images.clamp(-1, 1)).gather(1, y[:, None]).squeeze(1)

    def terms(self, record: StepRecord) -> list[Tensor] | None:
        if record.i % self.every:
            return None
        return [self._similarity(self.decode(record.guided.prediction.x0).float(), record.y)]

    def finished(self, images: Tensor, labels: Tensor) -> None:
        self.metrics["final"].update(0, self._similarity(images.float(), labels))

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        final, deviation = self.computed("final").flatten().tolist()
        if math.isnan(final):  # shards were made without this measurement
            return {}
        std = deviation / float(self.metrics["final"].sums[0, 0]) ** 0.5
        uncertainty = {"clip_score": METRICS["clip_score"].uncertainty(final, std, "samples, of their mean")}
        return {"clip_score": final, "uncertainty": uncertainty, "clip_score_t": self.moments(self.every)}

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        if not (moments := results.get("clip_score_t")):
            return []
        label = "CLIP score of $\\hat{x}_0$\n(mean ± std over samples)"
        return curves([Series("", *moments.values())], folder / "clip_score", label, least=None)


class TrajectoryStrips(Measurement, BufferedObserver):
    """Keeps x̂0 and the classifier's gradient of a few samples at a few steps (arXiv 2310.11311, Figure 4).

    ``trajectory.npz`` in the folder of the run holds ``index`` and ``label`` ``(k,)``, ``t`` ``(steps,)`` from noise to image,
    ``x0`` uint8 ``(k, steps, C, H, W)`` as it is decoded, and ``gradient`` float32 ``(k, steps, C', H', W')``, ∇S where the
    sampler is given it, NaN at steps where no classifier ran. Failed samples are not in it. It does not depend on batches,
    workers or restarts. Each sample takes 5 bytes for each number of each step.

    It is drawn as ``plots/trajectory``, and as the animation ``plots/animation.gif``, whose x̂0 are ``frames`` at ``frames_t``
    in the file. Where :class:`SampleQuality` has kept images of its reference, real ones of the same classes are beside them.

    Args:
        samples: indices of them; those beyond the samples of the run are not there.
        steps: how many steps are kept at most, evenly from the first to the last.
        frames: how many steps are animated at most, with those of ``steps``; 0 animates none.
    """

    def __init__(self, samples: Sequence[int] = (0, 1, 2, 3), steps: int = 8, frames: int = 25):
        if not samples or min(samples) < 0 or len(set(samples)) < len(samples):
            raise ConfigurationError(f"samples must be different indices of at least 0, at least one, got {samples}")
        if steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {steps}")
        if frames < 0:
            raise ConfigurationError(f"frames must be at least 0, got {frames}")
        self.samples, self.steps, self.frames = frozenset(samples), steps, frames
        self.reset()

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        times = pl_module.sampler.levels(pl_module.denoiser).times

        def evenly(count: int) -> list[int]:
            return np.linspace(len(times) - 1, 0, min(count, len(times))).round().astype(int).tolist()

        in_strip = set(evenly(self.steps))
        kept = sorted(in_strip | set(evenly(self.frames) if self.frames else ()), reverse=True)
        self.t, self.places = times[kept], {i: place for place, i in enumerate(kept)}
        self.in_strip = [place for place, i in enumerate(kept) if i in in_strip]
        self.names = find_class_names(trainer.datamodule, pl_module)
        self.decode = pl_module.denoiser.decode
        self.noted: dict[int, tuple[list[int], Tensor, Tensor, Tensor]] = {}  # by place: rows, labels, x̂0, gradients
        self.context.observe(self)

    def __call__(self, record: StepRecord) -> None:
        if record.i not in self.places:
            return
        rows = [row for row, index in enumerate(self.context.indices) if index in self.samples]
        if not rows:
            return

        def chosen(tensor: Tensor) -> Tensor:  # without an upload of indices, which would wait
            return torch.stack([tensor[row] for row in rows])

        with torch.no_grad():
            x0 = to_uint8(self.decode(chosen(record.guided.prediction.x0)))
        (_, gradient, fresh), place = record.guided.aux, self.places[record.i]
        gradient = torch.full_like(chosen(record.x_t), torch.nan) if gradient is None else chosen(gradient)
        if fresh is not None:
            gradient = gradient.where(chosen(fresh).view(-1, 1, 1, 1), torch.nan)
        # Of a step that is repeated, the last time.
        self.noted[place] = rows, chosen(record.y), x0, gradient.float()

    def count(self, rows: slice | Tensor) -> None:
        if len(self.noted) == len(self.places):  # else memory ran out on the way
            kept = set(range(len(self.context.indices))[rows] if isinstance(rows, slice) else rows.tolist())
            steps = [self.noted[place] for place in sorted(self.noted)]
            chosen, labels, _, _ = steps[0]
            for k, row in enumerate(chosen):
                if row in kept:
                    frames = torch.stack([x0[k] for _, _, x0, _ in steps])
                    gradient = torch.stack([steps[place][3][k] for place in self.in_strip])
                    values = torch.tensor(self.context.indices[row]), labels[k], frames, gradient
                    for column, value in zip(self.columns.values(), values, strict=True):
                        column.append(value.cpu())
        self.noted.clear()

    def rows(self) -> dict[str, Tensor]:
        empty = {name: torch.zeros(0, dtype=dtype) for name, dtype in _COLUMNS.items()}
        return {name: torch.stack(column) if column else empty[name] for name, column in self.columns.items()}

    def reset(self) -> None:
        self.columns: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}

    def load(self, kept: dict[str, Tensor]) -> None:
        self.columns = {name: list(kept[name][kept["index"].argsort()]) for name in _COLUMNS}

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        if trainer.is_global_zero:
            path = self.context.store.path / "trajectory.npz"
            path.unlink(missing_ok=True)  # an earlier report's
            if self.columns["index"]:
                columns = {name: column.numpy() for name, column in self.rows().items()}
                columns |= {"t": self.t[self.in_strip], "x0": columns["frames"][:, self.in_strip]}
                if self.frames:
                    columns["frames_t"] = self.t
                else:
                    del columns["frames"]
                with atomic_write(path) as file:
                    np.savez_compressed(file, **columns)
        return {}

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        if not self.columns["index"]:
            return []
        columns, path = self.rows(), self.context.store.path / REAL_IMAGES
        labels, frames = columns["label"].tolist(), columns["frames"].numpy()
        names = [title_of(label, self.names) for label in labels]
        kept = np.load(path) if path.is_file() else None
        real = real_of_classes(labels, frames.shape[2:], kept)
        places = self.in_strip
        drawn = strips(frames[:, places], columns["gradient"], self.t[places], names, folder / "trajectory", real)
        plain = [name.replace(r"\$", "$") for name in names]
        return drawn + (animation(frames, self.t, plain, folder / "animation", real) if self.frames else [])
