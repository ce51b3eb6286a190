"""Report of a validation or test: calibration of the classifier by noise level."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from calib_guidance.backend.atomic import write_text
from calib_guidance.metrics import Levels
from calib_guidance.plots import reliability


def _plain(measured: Levels) -> dict[str, Any]:
    """Overall and by level as JSON has it, null where nothing was seen."""
    return {
        "overall": None if measured.overall.isnan() else float(measured.overall),
        "by_level": [None if value.isnan() else float(value) for value in measured.by_level],
    }


class CalibrationReport(L.Callback):
    """After each validation and each test: every measure by noise level, and reliability diagrams.

    ``calibration/val-step00000100.json``, ``.png`` and ``.pdf`` in the trainer's default_root_dir hold the measures and the
    diagrams, one panel per noise level. The diagrams also go to TensorBoard as an image, and their bins beside a CSV logger's
    metrics as ``reliability.csv``. The commands ``validate`` and ``test`` also print a table.

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
        bins = pl_module.reliability()
        if not trainer.is_global_zero:
            return
        names = [f"t = {pl_module.level_range(k).replace('-', '–')}" for k in range(pl_module.num_levels)]
        levels = int((bins[..., 0].sum(-1) > 0).sum())
        folder = Path(trainer.default_root_dir, "calibration")
        path = folder / f"{stage}-step{trainer.global_step:08d}.json"
        content = {
            "step": trainer.global_step,
            "levels": [pl_module.level_range(k) for k in range(pl_module.num_levels)],
            "count": bins[..., 0].sum(-1).long().tolist(),
            **{name: _plain(value) for name, value in measured.items()},
        }
        write_text(path, json.dumps(content, indent=1) + "\n")
        if self.plots:
            titles = ["all"] if levels == 1 else ["all", *names]
            panels = bins.sum(0, keepdim=True) if levels == 1 else torch.cat([bins.sum(0, keepdim=True), bins])
            picture, _ = reliability(panels.cpu(), titles, path.with_suffix(""))
            self._log_figure(picture, stage, trainer)
        self._log_bins(bins, pl_module, stage, trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self._print(content, levels)
            print(f"wrote {path}")

    @staticmethod
    def _log_figure(path: Path, stage: str, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                image = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(f"{stage}/reliability", image, trainer.global_step, dataformats="HWC")

    @staticmethod
    def _log_bins(bins: torch.Tensor, pl_module: L.LightningModule, stage: str, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                continue
            path = Path(logger.log_dir, "reliability.csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            with open(path, "a", newline="") as file:
                writer = csv.writer(file)
                if fresh:
                    writer.writerow(["stage", "step", "t", "bin", "count", "mean_confidence", "accuracy"])
                for level, level_bins in enumerate(bins.tolist()):
                    for number, (count, confidence, correct) in enumerate(level_bins):
                        if count:
                            t = pl_module.level_range(level)
                            row = [
                                stage,
                                trainer.global_step,
                                t,
                                number,
                                int(count),
                                confidence / count,
                                correct / count,
                            ]
                            writer.writerow(row)

    @staticmethod
    def _print(content: dict[str, Any], levels: int) -> None:
        names = [name for name, value in content.items() if isinstance(value, dict)]
        wide = max(map(len, names))
        columns = {"overall": [content[name]["overall"] for name in names]}
        if levels > 1:
            columns |= {
                f"t={text}": [content[name]["by_level"][k] for name in names]
                for k, text in enumerate(content["levels"])
                if content["count"][k]
            }
        print(f"\n{sum(content['count'])} held-out samples")
        print(" " * (wide + 2) + "".join(f"{title:>11}" for title in columns))
        for row, name in enumerate(names):
            cells = ["–" if values[row] is None else f"{values[row]:.4f}" for values in columns.values()]
            print(f"  {name:<{wide}}" + "".join(f"{cell:>11}" for cell in cells))
