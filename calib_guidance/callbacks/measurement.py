"""What measures a sampling run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric


class Measurement(L.Callback):
    """A callback with results for :class:`~calib_guidance.callbacks.RunReport`, which asks for them when all samples are made.

    Results cover the complete run folder, however many runs and workers made it. What cannot be measured from the written
    samples is kept as sums, or as rows of single samples: :class:`~calib_guidance.callbacks.SampleWriter` stores those of a
    shard with it, and at the end each measurement is given those of all shards.
    """

    def finished(self, images: Tensor, labels: Tensor) -> None:
        """Samples that are about to be written: ``(N, C, H, W)`` in [-1, 1] and ``(N,)`` classes, on the device."""

    def sums(self) -> dict[str, Tensor]:
        """What is kept of the samples since :meth:`reset`: tensors that add up over samples, by name."""
        return {}

    def rows(self) -> dict[str, Tensor]:
        """What is kept of single samples since :meth:`reset`: tensors ``(k, …)`` to be joined over shards, by name.

        Of no sample it is ``(0,)``, whatever the shape of one is.
        """
        return {}

    def reset(self) -> None:
        """Forget all samples."""

    def load(self, kept: dict[str, Tensor]) -> None:
        """Take the sums and rows of all samples in place of those that were kept."""

    def load_blocks(self, sums: dict[str, Tensor]) -> None:
        """Take the sums of blocks of samples ``(G, …)``, which add up to those of :meth:`load`: for a standard error.

        Only where there are blocks enough, and after :meth:`load`.
        """

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Values by name. Called on every rank, and may synchronise them; only rank 0's answer is used."""
        return {}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        """Write plots, on rank 0 only, after :meth:`results`."""
        return []


def compute(metric: Metric, trainer: L.Trainer) -> Any:
    """The metric over all ranks. A rank that saw no batch takes part with its empty state."""
    metric = metric.to(trainer.strategy.root_device)
    metric._update_count = max(metric._update_count, 1)  # else torchmetrics warns of a rank without samples
    with torch.no_grad():
        return metric.compute()
