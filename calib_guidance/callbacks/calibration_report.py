"""Report of a validation or test: calibration of the classifier by noise level."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from calib_guidance.evaluation.output import plain, write_json
from calib_guidance.plots import reliability


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
        levels = [pl_module.level_range(k) for k in range(pl_module.num_levels)]
        count = bins[..., 0].sum(-1).long().tolist()
        several = sum(map(bool, count)) != 1
        path = Path(trainer.default_root_dir, "calibration", f"{stage}-step{trainer.global_step:08d}.json")
        content = plain(
            {"step": trainer.global_step, "levels": levels, "count": count}
            | {name: {"overall": float(m.overall), "by_level": m.by_level.tolist()} for name, m in measured.items()}
        )
        write_json(path, content)
        if self.plots:
            panels, titles = bins.sum(0, keepdim=True), ["all"]
            if several:
                panels = torch.cat([panels, bins])
                titles += [f"t = {level.replace('-', '–')}" for level in levels]
            picture, _ = reliability(panels.cpu(), titles, path.with_suffix(""))
        for logger in trainer.loggers:
            if self.plots and isinstance(logger, TensorBoardLogger):
                image = np.asarray(Image.open(picture).convert("RGB"))
                logger.experiment.add_image(f"{stage}/reliability", image, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, CSVLogger):
                self._write_bins(Path(logger.log_dir, "reliability.csv"), [stage, trainer.global_step], levels, bins)
        if trainer.state.fn != TrainerFn.FITTING:
            self._print(content, several)
            print(f"wrote {path}")

    @staticmethod
    def _write_bins(path: Path, when: list[Any], levels: list[str], bins: torch.Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["stage", "step", "t", "bin", "count", "mean_confidence", "accuracy"])
            for level, level_bins in zip(levels, bins.tolist(), strict=True):
                for number, (count, confidence, correct) in enumerate(level_bins):
                    if count:
                        writer.writerow([*when, level, number, int(count), confidence / count, correct / count])

    @staticmethod
    def _print(content: dict[str, Any], several: bool) -> None:
        names = [name for name, value in content.items() if isinstance(value, dict)]
        wide = max(map(len, names))
        columns = {"overall": [content[name]["overall"] for name in names]}
        if several:
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
