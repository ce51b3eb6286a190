"""Ends a sampling run: a table, ``metrics.json`` and figures."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from calib_guidance import __version__
from calib_guidance.callbacks.measurement import Measurement, compute
from calib_guidance.callbacks.sample_writer import SampleWriter

TABLE = {
    "frechet_distance": ("Fréchet distance", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "judge_accuracy": ("accuracy (judge)", "{:.3f}"),
    "clip_score": ("CLIP score", "{:.4f}"),
    "integral_ece": ("integral ECE", "{:.3f}"),
    "seconds_per_image": ("seconds per image", "{:.4f}"),
}


def _plain(value: Any) -> Any:
    """NaN as null, which JSON has."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunReport(Measurement):
    """Asks the other callbacks for their results after the last batch, prints the table and writes what it is made of.

    Seconds per image are those of sampling on one device, without measuring and writing.

    Args:
        figures: draw the figures.
    """

    def __init__(self, figures: bool = True):
        self.figures = figures

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not an epoch-end hook: a rank without batches gets none, and the results are collective.
        if stage != "predict":
            return
        measurements = [callback for callback in trainer.callbacks if isinstance(callback, Measurement)]
        trainer.strategy.barrier("all samples written")
        results: dict[str, Any] = {"num_samples": len(trainer.datamodule)}
        for measurement in measurements:
            results |= measurement.results(trainer)
        results["seconds_per_image"] = float(compute(pl_module.seconds_per_image, trainer))
        if not trainer.is_global_zero:
            return
        results["num_evaluations"] = pl_module.sampler.num_evaluations(pl_module.denoiser)
        results["weights"] = {
            name: module.provenance for name, module in pl_module.named_modules() if getattr(module, "provenance", None)
        }
        results["versions"] = {"calib_guidance": __version__, "torch": torch.__version__}
        folder = Path(trainer.default_root_dir)
        path = folder / "metrics.json"
        temporary = folder / f".metrics.json.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(_plain(results), indent=1) + "\n")
        os.replace(temporary, path)
        figures = [p for m in measurements for p in m.draw(folder / "figures", trainer)] if self.figures else []
        samples = [m.path for m in measurements if isinstance(m, SampleWriter)]
        self._print(results, [*samples, path, folder / "config.yaml", *figures])

    @staticmethod
    def _print(results: dict[str, Any], paths: list[Path]) -> None:
        rows = [(label, form.format(results[key])) for key, (label, form) in TABLE.items() if key in results]
        wide = max(len(label) for label, _ in rows)
        print(f"\n{results['num_samples']} samples, {results['num_evaluations']} network evaluations each")
        print("\n".join(f"  {label:<{wide}}  {value:>8}" for label, value in rows))
        print("wrote\n" + "\n".join(f"  {path}" for path in paths if path.exists()))
