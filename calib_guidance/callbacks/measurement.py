"""What measures a sampling run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchmetrics import Metric


class Measurement(L.Callback):
    """A callback with results for :class:`~calib_guidance.callbacks.RunReport`, which asks for them after the last batch."""

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Figures by name. Called on every rank, and may synchronise them; only rank 0's answer is used."""
        return {}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        """Write figures, on rank 0 only, after :meth:`results`."""
        return []


def compute(metric: Metric, trainer: L.Trainer) -> Any:
    """The metric over all ranks. A rank that saw no batch takes part with its empty state."""
    metric = metric.to(trainer.strategy.root_device)
    metric._update_count = max(metric._update_count, 1)  # else torchmetrics warns of a rank without samples
    with torch.no_grad():
        return metric.compute()
