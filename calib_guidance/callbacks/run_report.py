"""Report of a sampling run: a table, ``metrics.json`` and plots."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch

from calib_guidance import __version__
from calib_guidance.callbacks.loggers import log_plots
from calib_guidance.callbacks.measurement import kept_measurements, load_kept
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.output import described, described_uncertainty, printed_table, write_json
from calib_guidance.runs.status import status_lines, survey

log = logging.getLogger(__name__)
_LISTED = 10  # samples in a message


class RunReport(L.Callback):
    """Prints the table of a complete run and writes ``metrics.json`` and plots.

    The results of all measurements cover the complete folder, however many runs and workers made it; there are none before.
    Seconds per image are those of sampling on one device, without measuring and writing.

    Args:
        plots: draw the plots of all callbacks.
    """

    def __init__(self, plots: bool = True):
        self.plots = plots

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.context.store is None:
            raise ConfigurationError(
                "RunReport reports what SampleWriter has written: add calib_guidance.callbacks.SampleWriter to trainer.callbacks"
            )
        if trainer.is_global_zero:  # samples are missing, so an earlier report does not cover the complete folder
            pl_module.context.store.remove_report()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not an epoch-end hook: a rank without batches gets none, and the results are collective.
        if stage != "predict" or pl_module.context.store is None:
            return
        context = pl_module.context
        trainer.strategy.barrier("all samples written")
        run = context.store.extended()
        state = survey(run)
        # As rank 0 sees it: file systems may show the others an older state.
        if not trainer.strategy.broadcast(state["complete"]):
            if trainer.is_global_zero:
                print("", *status_lines(state), "re-run to resume; the last worker prints the report", sep="\n")
            return
        for name, measurement in kept_measurements(context).items():
            if not load_kept(run, name, measurement):
                log.warning(
                    f"{type(measurement).__name__} is not in the report: some samples were made without it, or with other "
                    "settings of it"
                )
        results: dict[str, Any] = {}
        uncertainty: dict[str, Any] = {}
        for measurement in context.measurements:
            found = measurement.results(trainer)
            uncertainty |= found.get("uncertainty", {})
            results |= found
        results["uncertainty"] = uncertainty
        if not trainer.is_global_zero:
            return
        results["nfe"] = pl_module.sampler.nfe(pl_module.denoiser)
        results["weights"] = {
            name: module.provenance for name, module in pl_module.named_modules() if getattr(module, "provenance", None)
        }
        results["versions"] = {"calib_guidance": __version__, "torch": torch.__version__}
        folder = run.path
        path = folder / "metrics.json"
        write_json(path, results)
        plots = [p for m in context.measurements for p in m.draw(folder / "plots", trainer)] if self.plots else []
        numbers = {key: float(value) for key, value in results.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, results["num_samples"])
        pictures = {f"plots/{path.stem}": path for path in plots if path.suffix == ".png"}
        log_plots(trainer, pictures, results["num_samples"])
        predictions = ["predictions.npz"] if "classifier_accuracy" in results else []
        written = [run.samples, path, *(folder / name for name in (*predictions, "trajectory.npz", "config.yaml"))]
        context.report = self._text(results, folder, [path for path in written if path.exists()], plots)
        print(context.report)

    @staticmethod
    def _text(results: dict[str, Any], folder: Path, written: list[Path], plots: list[Path]) -> str:
        lines = [f"\n{results['num_samples']} samples, {results['nfe']} NFE each", printed_table(results)]
        lines += described(results) if "features" in results else described_uncertainty(results)
        if failed := results.get("failed"):
            lines.append(
                f"{len(failed)} failed samples: {', '.join(str(sample['index']) for sample in failed[:_LISTED])}"
            )
        names = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in written]
        lines.append(f"wrote to {folder}: {', '.join(names)}")
        if plots:
            endings = ", ".join(dict.fromkeys(path.suffix for path in plots))
            lines.append(f"plots/ ({endings}): {', '.join(dict.fromkeys(path.stem for path in plots))}")
        lines.append(f"one page of it all: calib-guidance report {folder}")
        return "\n".join(lines)
