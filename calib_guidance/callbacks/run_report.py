"""Ends a sampling run: a table, ``metrics.json`` and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from calib_guidance import __version__
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.callbacks.sample_writer import SampleWriter
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.output import described, described_uncertainty, printed_table, write_json
from calib_guidance.runs import RunFolder
from calib_guidance.runs.integrity import ShardState

_LISTED = 10  # shards or samples in a message


class RunReport(Measurement):
    """Prints the table of metrics when all samples are made, and writes ``metrics.json`` and plots.

    Results cover the complete run folder, however many runs and workers made it; until it is complete there are none.
    Seconds per image are those of sampling on one device, without measuring and writing.

    Args:
        plots: draw the plots of all callbacks.
    """

    def __init__(self, plots: bool = True):
        self.plots = plots

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict" and self._writer(trainer) is None:
            raise ConfigurationError(
                "RunReport reports what SampleWriter has written: add calib_guidance.callbacks.SampleWriter to trainer.callbacks"
            )

    @staticmethod
    def _writer(trainer: L.Trainer) -> SampleWriter | None:
        return next((callback for callback in trainer.callbacks if isinstance(callback, SampleWriter)), None)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Samples are missing, so an earlier report does not cover the complete folder.
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "metrics.json").unlink(missing_ok=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not an epoch-end hook: a rank without batches gets none, and the results are collective.
        if stage != "predict":
            return
        writer = self._writer(trainer)
        trainer.strategy.barrier("all samples written")
        run = writer.run.extended()
        # As rank 0 sees it: file systems may show the others something older.
        missing = trainer.strategy.broadcast([(shard, run.state(shard)) for shard in run.remaining()])
        if missing:
            if trainer.is_global_zero:
                self._print_missing(run, missing)
            return
        measurements = [callback for callback in trainer.callbacks if isinstance(callback, Measurement)]
        writer.load_sums(trainer)
        results: dict[str, Any] = {}
        uncertainty: dict[str, Any] = {}
        for measurement in measurements:
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
        folder = Path(trainer.default_root_dir)
        path = folder / "metrics.json"
        write_json(path, results)
        plots = [p for m in measurements for p in m.draw(folder / "plots", trainer)] if self.plots else []
        predictions = ["predictions.npz"] if "classifier_accuracy" in results else []
        written = [run.samples, path, *(folder / name for name in (*predictions, "trajectory.npz", "config.yaml"))]
        self._print(results, folder, [path for path in written if path.exists()], plots)

    @staticmethod
    def _print_missing(run: RunFolder, missing: list[tuple[range, ShardState]]) -> None:
        """What is left, and who has it."""
        left = sum(len(shard) for shard, _ in missing)
        print(f"\n{left} of {run.num_requests} samples are not made yet. Their report comes when all are:")
        for shard, state in missing[:_LISTED]:
            print(f"  {shard.start} … {shard[-1]}: {state.name}, {state.reason}")
        if len(missing) > _LISTED:
            print(f"  and {len(missing) - _LISTED} shards more")
        print("re-run to resume; the worker that makes the last sample prints the report")

    @staticmethod
    def _print(results: dict[str, Any], folder: Path, written: list[Path], plots: list[Path]) -> None:
        print(f"\n{results['num_samples']} samples, {results['nfe']} NFE each")
        print(printed_table(results))
        for line in described(results) if "features" in results else described_uncertainty(results):
            print(line)
        if failed := results.get("failed"):
            print(f"{len(failed)} failed samples: {', '.join(str(sample['index']) for sample in failed[:_LISTED])}")
        names = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in written]
        print(f"wrote to {folder}: {', '.join(names)}")
        if plots:
            endings = ", ".join(dict.fromkeys(path.suffix for path in plots))
            print(f"plots/ ({endings}): {', '.join(dict.fromkeys(path.stem for path in plots))}")
