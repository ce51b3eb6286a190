"""How well samples fit their prompts, along the trajectory (arXiv 2310.11311, Figure 7)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from calib_guidance.callbacks.measurement import compute
from calib_guidance.callbacks.trajectory import TrajectoryMeasurement
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.plots import Series, curves
from calib_guidance.samplers import StepRecord


class TrajectoryCLIPScore(TrajectoryMeasurement):
    """Cosine between the image of x̂0 and the prompt that was asked for, at every step, and of the finished samples.

    The CLIP model is its own, whatever guides, so that runs with other schedules or without guidance compare. Each
    measured step costs a decoding of x̂0, in latent models, and a forward pass of CLIP, which the seconds per image include.

    Args:
        clip: with one prompt for each class of the requests; frozen here.
        every: k ≥ 1, to measure at every k-th step, counted from the last one.
    """

    def __init__(self, clip: CLIPClassifier, every: int = 1):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.clip, self.every = clip.freeze(), every

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().begin(trainer, pl_module)
        device, requests, prompts = trainer.strategy.root_device, trainer.datamodule, self.clip.num_classes
        if requests.num_classes != prompts:
            raise ConfigurationError(
                f"the requests have {requests.num_classes} classes, the CLIP score {prompts} prompts: give it one for each class"
            )
        self.clip.to(device)
        self.decode, self.final = pl_module.denoiser.decode, self.build(1).to(device)
        with torch.no_grad():
            image = self.decode(torch.zeros(1, *pl_module.denoiser.image_shape, device=pl_module.device))
        try:
            self.clip.check_image(tuple(image.shape[1:]))
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
        self.final.update(0, self._similarity(images.float(), labels))

    def sums(self) -> dict[str, Tensor]:
        return super().sums() | {"final": self.final.sums}

    def reset(self) -> None:
        super().reset()
        self.final.reset()

    def load(self, sums: dict[str, Tensor]) -> None:
        super().load(sums)
        self.final.sums = sums["final"].to(self.final.sums)

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        mean, deviation = (value[:: self.every].tolist() for value in compute(self.metric, trainer))
        self.curve = {"t": self.t[:: self.every], "mean": mean, "std": deviation}
        final, deviation = (float(value) for value in compute(self.final, trainer))
        if math.isnan(final):  # shards were made without this measurement
            return {}
        std = deviation / float(self.final.sums[0, 0]) ** 0.5
        uncertainty = METRICS["clip_score"].uncertainty(final, std, "samples, of their mean")
        return {"clip_score": final, "uncertainty": {"clip_score": uncertainty}, "clip_score_t": self.curve}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if all(math.isnan(value) for value in self.curve["mean"]):
            return []
        label = "CLIP score of $\\hat{x}_0$\n(mean ± std over samples)"
        return curves([Series("", *self.curve.values())], folder / "clip_score", label, least=None)
