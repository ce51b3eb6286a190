"""What goes to every Lightning logger beside the metrics that Lightning logs: plots and the configuration; logs that continue."""

from __future__ import annotations

import csv
import io
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image

from calib_guidance.backend.atomic import link_or_copy, write_text

STATE = "calib_guidance"  # key of what a checkpoint holds for this package


def log_plots(trainer: L.Trainer, plots: Mapping[str, Path], step: int) -> None:
    """Log PNG files by name: as images where the logger takes them (TensorBoard, W&B), else as files in its folder (CSV)."""
    for logger in trainer.loggers:
        for name, path in plots.items():
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            elif hasattr(logger, "log_image"):
                logger.log_image(name, [str(path)], step)
            elif logger.log_dir:
                target = Path(logger.log_dir, f"{name.replace('/', '_')}-step{step:08d}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)


def log_configuration(trainer: L.Trainer, configuration: Mapping[str, Any]) -> None:
    """Log the resolved configuration as hyper-parameters."""
    plain = json.loads(json.dumps({k: v for k, v in configuration.items() if k != "config"}, default=str))
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, in place of those that it has of the same or a later step."""
    steps = {(row["stage"], row["step"]) for row in rows}
    earlier = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    kept = [r for r in earlier if not any(r["stage"] == stage and int(r["step"]) >= step for stage, step in steps)]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(path, file.getvalue())


def continue_logs(loggers: Sequence[Logger], checkpoint: Path) -> None:
    """Let CSV and TensorBoard loggers without a version continue the logs of the run that wrote a checkpoint, from its step.

    Called before anything is logged.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        versions, due = content[STATE]["logger_versions"], content[STATE]["validation_due"]
        step = content["global_step"]
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError):
        return  # corrupted, which loading it reports, or another program's
    for logger in loggers:
        version = versions.get(type(logger).__name__)
        if version is None or not isinstance(logger, CSVLogger | TensorBoardLogger) or logger._version is not None:
            continue
        logger._version = version
        if not Path(logger.log_dir).is_dir():  # of another folder
            logger._version = None
        elif isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step
        else:
            _continue_csv(logger, step, due)


def _continue_csv(logger: CSVLogger, step: int, due: bool) -> None:
    """Keep the rows before a step, without those of its validation where that is due again."""
    path = Path(logger.log_dir, "metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    with warnings.catch_warnings(action="ignore"):  # that earlier files will be deleted
        experiment = logger.experiment
    if experiment is not None:  # on rank 0
        kept = ({k: v for k, v in row.items() if v} for row in rows if int(row["step"]) < step)
        again = (
            row for row in kept if not due or int(row["step"]) < step - 1 or not any(k.startswith("val/") for k in row)
        )
        experiment.metrics = list(again)
        experiment.save()
