"""Reports of sampling runs, and of validations and tests of classifiers: on the terminal, in files, and to every logger."""

import importlib
import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from calib_guidance import __version__
from calib_guidance.backend.atomic import link_or_copy
from calib_guidance.backend.distributed import physical_cores
from calib_guidance.backend.workers import in_forks
from calib_guidance.callbacks.measurement import kept_measurements, load_kept
from calib_guidance.callbacks.processes import can_fork
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.quality import described, described_uncertainty, printed_table, write_json
from calib_guidance.plots import reliability
from calib_guidance.runs.context import SamplingContext
from calib_guidance.runs.status import status_lines, survey

log = logging.getLogger(__name__)
_LISTED = 10  # samples in a message


def _log_plots(trainer: L.Trainer, plots: Mapping[str, Path], step: int) -> None:
    """Log PNG and GIF files by name: as images and videos where the logger takes them, else as files in its folder (CSV)."""
    for logger in trainer.loggers:
        for name, path in plots.items():
            moves = path.suffix == ".gif"
            if isinstance(logger, TensorBoardLogger) and moves:
                _add_gif(logger, name, path, step)
            elif hasattr(logger, "log_video") and moves:
                logger.log_video(name, [str(path)], step, format=["gif"])
            elif isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            elif hasattr(logger, "log_image") and not moves:
                logger.log_image(name, [str(path)], step)
            elif logger.log_dir:
                target = Path(logger.log_dir, f"{name.replace('/', '_')}-step{step:08d}{path.suffix}")
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)


def _add_gif(logger: TensorBoardLogger, name: str, path: Path, step: int) -> None:
    """TensorBoard shows a GIF among its images, but its writer takes pixels alone."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(path) as image:
        width, height = image.size
    content = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes())
    logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=content)]), step)


def log_configuration(trainer: L.Trainer, configuration: Mapping[str, Any]) -> None:
    """Log the resolved configuration as hyper-parameters."""
    plain = json.loads(json.dumps({k: v for k, v in configuration.items() if k != "config"}, default=str))
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)


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
        results: dict[str, Any] = {"uncertainty": {}}
        for measurement in context.measurements:
            found = measurement.results(trainer)
            results |= found | {"uncertainty": results["uncertainty"] | found.get("uncertainty", {})}
        if not trainer.is_global_zero:
            return
        run.clean_up()  # a worker of this run may have been killed while it wrote
        results["nfe"] = pl_module.sampler.nfe(pl_module.denoiser)
        stated = {name: getattr(module, "provenance", None) for name, module in pl_module.named_modules()}
        results["weights"] = {name: provenance for name, provenance in stated.items() if provenance}
        results["versions"] = {"calib_guidance": __version__, "torch": torch.__version__}
        folder, path = run.path, run.path / "metrics.json"
        write_json(path, results)
        plots = self._draw(trainer, context, results, folder / "plots") if self.plots else []
        numbers = {key: float(value) for key, value in results.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, results["num_samples"])
        pictures = {f"plots/{path.stem}": path for path in plots if path.suffix in (".png", ".gif")}
        _log_plots(trainer, pictures, results["num_samples"])
        names = ["predictions.npz"] if "classifier_accuracy" in results else []
        names = [
            name for name in ("samples", path.name, *names, "trajectory.npz", "config.yaml") if (folder / name).exists()
        ]
        context.report = self._text(results, folder, names, plots)
        print(context.report)

    @staticmethod
    def _draw(trainer: L.Trainer, context: SamplingContext, results: Mapping[str, Any], folder: Path) -> list[Path]:
        """Let every measurement draw, beside the others where the run may fork."""
        jobs = [partial(measurement.draw, results, folder) for measurement in context.measurements]
        cores = physical_cores() if context.num_processes != 1 and can_fork(trainer) else 1
        if cores > 1:
            importlib.import_module("matplotlib.backends.backend_pdf")  # once, and not in each fork
            drawn = in_forks(jobs, min(cores, len(jobs)))
        else:
            drawn = [job() for job in jobs]
        return [path for paths in drawn for path in paths]

    @staticmethod
    def _text(results: dict[str, Any], folder: Path, written: list[str], plots: list[Path]) -> str:
        lines = [f"\n{results['num_samples']} samples, {results['nfe']} NFE each", printed_table(results)]
        lines += described(results) if "features" in results else described_uncertainty(results)
        if failed := results.get("failed"):
            listed = ", ".join(str(sample["index"]) for sample in failed[:_LISTED])
            lines.append(f"{len(failed)} failed samples: {listed}")
        lines.append(f"wrote to {folder}: {', '.join(written)}")
        if plots:
            endings = ", ".join(dict.fromkeys(path.suffix for path in plots))
            lines.append(f"plots/ ({endings}): {', '.join(dict.fromkeys(path.stem for path in plots))}")
        lines.append(f"one page of it all: calib-guidance report {folder}")
        return "\n".join(lines)


class CalibrationReport(L.Callback):
    """Report after each validation and test: every measure by noise level, and reliability diagrams.

    ``calibration/val-step00000100.json``, ``.png`` and ``.pdf`` in the trainer's default_root_dir hold the measures, the bins
    ``(levels, bins, 3)`` of the diagrams (count, summed confidence, number correct), and the diagrams, one panel per noise level.
    The diagrams also go to every logger. The commands ``validate`` and ``test`` also print a table.

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
        write_json(path, {"step": step, "levels": ranges, "count": counts.tolist(), "bins": bins.tolist(), **values})
        if self.plots:
            panels = [bins.sum(0, keepdim=True), *([bins] if several else [])]
            titles = ["all", *(f"t = {text.replace('-', '–')}" for text in ranges if several)]
            picture, _ = reliability(torch.cat(panels), titles, path.with_suffix(""))
            _log_plots(trainer, {f"{stage}/reliability": picture}, step)
        if trainer.state.fn != TrainerFn.FITTING:
            seen = [k for k, count in enumerate(counts.tolist()) if count and several]
            titles = ["overall", *(f"t={ranges[k]}" for k in seen)]
            wide = max(map(len, values)) + 2
            print(f"\n{int(counts.sum())} held-out samples\n{'':{wide}}" + "".join(f"{title:>11}" for title in titles))
            for name, v in values.items():
                row = [v["overall"], *(v["by_level"][k] for k in seen)]
                cells = ("–" if math.isnan(value) else f"{value:.4f}" for value in row)
                print(f"  {name:<{wide - 2}}" + "".join(f"{cell:>11}" for cell in cells))
            print(f"wrote {path}")
