"""x̂0 and the classifier's gradient of a few samples along the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.errors import ConfigurationError
from calib_guidance.plots import strips
from calib_guidance.samplers import BufferedObserver, StepRecord

# Of each sample. Of no sample, a column of the type alone.
_COLUMNS = {"index": torch.long, "label": torch.long, "x0": torch.uint8, "gradient": torch.float32}


class TrajectoryStrips(Measurement, BufferedObserver):
    """Keeps x̂0 and the classifier's gradient of a few samples at a few steps (arXiv 2310.11311, Figure 4).

    ``trajectory.npz`` in the folder of the run holds ``index`` and ``label`` ``(k,)``, ``t`` ``(steps,)`` from noise to image,
    ``x0`` uint8 ``(k, steps, C, H, W)`` as it is decoded, and ``gradient`` float32 ``(k, steps, C', H', W')``, ∇S where the
    sampler is given it, NaN at steps where no classifier ran. Failed samples are not in it.

    Whoever makes one of the samples keeps it with its shard, so that what is in the file does not depend on batches, workers
    or restarts. Each sample takes 5 bytes for each number of each step.

    Args:
        samples: indices of them; those beyond the samples of the run are not there.
        steps: how many steps are kept at most, evenly from the first to the last.
    """

    def __init__(self, samples: Sequence[int] = (0, 1, 2, 3), steps: int = 8):
        if not samples or min(samples) < 0 or len(set(samples)) < len(samples):
            raise ConfigurationError(f"samples must be different indices of at least 0, at least one, got {samples}")
        if steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {steps}")
        self.samples, self.steps = frozenset(samples), steps
        self.reset()

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        times = pl_module.sampler.levels(pl_module.denoiser).times
        kept = np.unique(np.linspace(len(times) - 1, 0, min(self.steps, len(times))).round().astype(int))[::-1]
        self.t, self.places = times[kept], {int(i): place for place, i in enumerate(kept)}
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
        gradient = record.guided.aux.gradient
        gradient = torch.full_like(chosen(record.x_t), torch.nan) if gradient is None else chosen(gradient)
        # Of a step that is repeated, the last time.
        self.noted[self.places[record.i]] = rows, chosen(record.y), x0, gradient.float()

    def count(self, rows: slice | Tensor) -> None:
        if len(self.noted) == len(self.places):  # else memory ran out on the way
            kept = set(range(len(self.context.indices))[rows] if isinstance(rows, slice) else rows.tolist())
            chosen, labels, x0, gradient = zip(*(self.noted[place] for place in sorted(self.noted)), strict=True)
            columns = {"label": labels[0], "x0": torch.stack(x0, 1), "gradient": torch.stack(gradient, 1)}
            for k, row in enumerate(chosen[0]):
                if row in kept:
                    one = {"index": torch.tensor(self.context.indices[row])}
                    one |= {name: column[k].cpu() for name, column in columns.items()}
                    self._kept.append(one)
        self.noted.clear()

    def rows(self) -> dict[str, Tensor]:
        if not self._kept:
            return {name: torch.zeros(0, dtype=dtype) for name, dtype in _COLUMNS.items()}
        return {name: torch.stack([each[name] for each in self._kept]) for name in _COLUMNS}

    def reset(self) -> None:
        self._kept: list[dict[str, Tensor]] = []

    def load(self, kept: dict[str, Tensor]) -> None:
        order = kept["index"].argsort().tolist()
        self._kept = [{name: column[row] for name, column in kept.items()} for row in order]

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        if trainer.is_global_zero:
            path = self.context.store.path / "trajectory.npz"
            path.unlink(missing_ok=True)  # an earlier report's
            if self._kept:
                columns = {name: column.numpy() for name, column in self.rows().items()}
                with atomic_write(path) as file:
                    np.savez_compressed(file, t=self.t, **columns)
        return {}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        if not self._kept:
            return []
        columns = self.rows()
        names = [f"class {label}" for label in columns["label"].tolist()]
        return strips(columns["x0"], columns["gradient"], self.t, names, folder / "trajectory")
