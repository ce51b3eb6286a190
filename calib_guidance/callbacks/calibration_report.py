"""Report of a validation or test: calibration of the classifier by noise level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from calib_guidance.callbacks.loggers import append_rows, log_plots
from calib_guidance.evaluation.output import write_json
from calib_guidance.plots import reliability


class CalibrationReport(L.Callback):
    """After each validation and each test: every measure by noise level, and reliability diagrams.

    ``calibration/val-step00000100.json``, ``.png`` and ``.pdf`` in the trainer's default_root_dir hold the measures and the
    diagrams, one panel per noise level. The diagrams also go to every logger, and their bins beside a CSV logger's metrics as
    ``reliability.csv``. The commands ``validate`` and ``test`` also print a table.

    Args:
        plots: draw the reliability diagrams.
    """

    def __init__(self, plots: bool = True):
        self.plots = plots

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # The table of this report has the same numbers as Lightning's.
        trainer.validate_loop.verbose = trainer.test_loop.verbose = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report("val", trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report("test", trainer, pl_module)

    def _report(self, stage: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = pl_module.measured()  # on every rank: it may have to be summed over them
        bins = pl_module.reliability().cpu()
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        counts, step = bins[..., 0].sum(-1).long(), trainer.global_step
        ranges = [pl_module.level_range(k) for k in range(pl_module.num_levels)]
        several = int((counts > 0).sum()) > 1
        path = Path(trainer.default_root_dir, "calibration", f"{stage}-step{step:08d}.json")
        values = {name: {"overall": float(v.overall), "by_level": v.by_level.tolist()} for name, v in measured.items()}
        write_json(path, {"step": step, "levels": ranges, "count": counts.tolist(), **values})
        if self.plots:
            panels = [bins.sum(0, keepdim=True), *([bins] if several else [])]
            titles = ["all", *(f"t = {text.replace('-', '–')}" for text in ranges if several)]
            picture, _ = reliability(torch.cat(panels), titles, path.with_suffix(""))
            log_plots(trainer, {f"{stage}/reliability": picture}, step)
        rows = [{"stage": stage, "step": step} | row for row in _bin_rows(bins, ranges)]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and rows:
                append_rows(Path(logger.log_dir, "reliability.csv"), rows)
        if trainer.state.fn != TrainerFn.FITTING:
            seen = [k for k, count in enumerate(counts.tolist()) if count and several]
            titles = ["overall", *(f"t={ranges[k]}" for k in seen)]
            table = {name: [v["overall"], *(v["by_level"][k] for k in seen)] for name, v in values.items()}
            _print(f"{int(counts.sum())} held-out samples", titles, table)
            print(f"wrote {path}")


def _bin_rows(bins: torch.Tensor, ranges: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of ``reliability.csv``: the bins with samples."""
    for text, level_bins in zip(ranges, bins.tolist(), strict=True):
        for number, (count, confidence, correct) in enumerate(level_bins):
            if count:
                means = {"mean_confidence": confidence / count, "accuracy": correct / count}
                yield {"t": text, "bin": number, "count": int(count)} | means


def _print(title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    wide = max(map(len, rows))
    print(f"\n{title}\n" + " " * (wide + 2) + "".join(f"{column:>11}" for column in columns))
    for name, values in rows.items():
        cells = ("–" if math.isnan(value) else f"{value:.4f}" for value in values)
        print(f"  {name:<{wide}}" + "".join(f"{cell:>11}" for cell in cells))
