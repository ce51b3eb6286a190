"""Measurements of a sampling run, and what is kept of them with each shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.runs import RunFolder
from calib_guidance.runs.context import SamplingContext
from calib_guidance.runs.identity import settings_digest

_FEWEST_BLOCKS, _MOST_BLOCKS = 5, 50  # of shards, for standard deviations; so many are in memory


class Measurement(L.Callback):
    """Callback with results for :class:`~calib_guidance.callbacks.RunReport`, which asks for them when all samples are made.

    Results cover the complete folder, however many runs and workers made it. What cannot be measured from the written samples is
    kept as sums, or as rows of single samples: :class:`~calib_guidance.callbacks.SampleWriter` stores those of a shard with it,
    and at the end each measurement is given those of all shards.

    Attributes:
        context: of the run.
    """

    context: SamplingContext

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            pl_module.check()  # nothing of an earlier run is touched for a configuration that cannot run
            self.context = pl_module.context
            self.context.measure(self)
            self.begin(trainer, pl_module)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set up for a run whose parts fit together."""

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

        Called after :meth:`load`, if there are blocks enough.
        """

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Metrics by name. Called on every rank, and may synchronize them; only rank 0's answer is used."""
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


def kept_measurements(context: SamplingContext) -> dict[str, Measurement]:
    """Measurements that keep something, by class and settings: what two runs have under one name goes together."""
    callbacks = (context.configuration or {"trainer": {"callbacks": None}})["trainer"]["callbacks"] or []
    entries = [entry for entry in callbacks if "class_path" in entry]
    names: dict[str, Measurement] = {}
    for measurement in context.measurements:
        if not (measurement.sums() or measurement.rows()):
            continue
        kind = type(measurement).__name__
        entry = next((entry for entry in entries if entry["class_path"].rpartition(".")[2] == kind), {})
        if entry:
            entries.remove(entry)
        names[f"{kind}-{settings_digest(entry.get('init_args') or {})}"] = measurement
    return names


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of all parts; the shape of a row is not known where there are none."""
    return np.concatenate([part for part in parts if len(part)] or parts[:1])


def load_kept(run: RunFolder, name: str, measurement: Measurement) -> bool:
    """Give a measurement what is kept of all shards under its name; False if some shard was made without it."""
    measurement.reset()
    shards, sums, rows = run.shards(), measurement.sums(), measurement.rows()
    blocks: list[dict[str, np.ndarray]] = [{} for _ in range(min(len(shards), _MOST_BLOCKS))]
    totals: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in rows}
    for number, shard in enumerate(shards):
        kept = run.read_sums(shard)
        kept = {key: kept[f"{name}.{key}"] for key in [*sums, *rows] if f"{name}.{key}" in kept}
        if len(kept) < len(sums) + len(rows) or any(kept[key].shape != sums[key].shape for key in sums):
            return False
        for added in (totals, blocks[number * len(blocks) // len(shards)]):
            _add(added, {key: kept[key] for key in sums})
        for key in rows:
            parts[key].append(kept[key])
    totals |= {key: _joined(each) for key, each in parts.items()}
    measurement.load({key: torch.from_numpy(value) for key, value in totals.items()})
    if len(blocks) >= _FEWEST_BLOCKS:
        measurement.load_blocks({key: torch.from_numpy(np.stack([block[key] for block in blocks])) for key in sums})
    return True


def _add(sums: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    sums |= {key: sums[key] + value if key in sums else value for key, value in more.items()}
