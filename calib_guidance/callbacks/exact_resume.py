"""A ``fit`` that can be stopped anywhere, and resumes to what an uninterrupted one does."""

import csv
import logging
import os
import pickle
import signal
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from calib_guidance.backend.atomic import atomic_write, link_or_copy
from calib_guidance.callbacks.clean_stop import StopSignals
from calib_guidance.data.loading import hashed
from calib_guidance.errors import CheckpointError, ConfigurationError

log = logging.getLogger(__name__)
_STATE = "calib_guidance"  # key of what a checkpoint holds for this package
_EVERY = 5  # batches on several devices: they must agree about a signal, so they wait for each other
_STEPS = "epoch_loop.automatic_optimization.optim_progress"


def _is_sound(path: Path) -> bool:
    """Whether every part of a checkpoint can be read and has the checksum that was stored with it."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def _previous(path: str | Path) -> Path:
    """Path of the checkpoint that ``path`` replaced."""
    return Path(f"{path}.previous")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and keeps the one that is replaced as ``NAME.previous``.

    If a checkpoint fails its checksums, loading warns and takes the previous one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # remote storage replaces objects atomically
            return
        path = Path(path)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()  # a full disk shows here, before the previous checkpoint goes
            if zipfile.is_zipfile(path):  # a truncated one must not replace a good previous one
                link_or_copy(path, _previous(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        weights_only = weights_only is not False  # by default, None, an address would be unpickled
        if "://" in str(path) or not Path(path).exists() or _is_sound(Path(path)):
            return super().load_checkpoint(path, map_location, weights_only)
        if not _is_sound(previous := _previous(path)):
            raise CheckpointError(
                f"{path} is corrupted, and there is no previous checkpoint ({previous}): remove it and restart the run without "
                "--ckpt_path"
            )
        rank_zero_warn(f"{path} is corrupted: resuming from the previous checkpoint, {previous}")
        return super().load_checkpoint(previous, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        if "://" not in str(path):
            _previous(path).unlink(missing_ok=True)


def continue_logs(loggers: Sequence[Logger], checkpoint: Path) -> None:
    """Let CSV and TensorBoard loggers without a version continue those of a checkpoint's run, before anything is logged."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        versions, due = content[_STATE]["logger_versions"], content[_STATE]["validation_due"]
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
        kept = [{k: v for k, v in row.items() if v} for row in rows if int(row["step"]) < step]
        last = [row for row in kept if int(row["step"]) == step - 1 and any(k.startswith("val/") for k in row)]
        experiment.metrics = [row for row in kept if not due or row not in last]
        experiment.save()


def _at_epoch_end(loops: dict[str, Any]) -> bool:
    """Whether the loops of a checkpoint stood between two epochs."""
    batch = loops["epoch_loop.batch_progress"]
    return batch["is_last_batch"] or not batch["current"]["processed"]


def epoch_end_checkpoints(folder: Path) -> list[str]:
    """Checkpoints of a folder that were written at the end of an epoch, the newest first."""
    found = []
    for path in sorted(folder.glob("*.ckpt*"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if _at_epoch_end(content["loops"]["fit_loop"]):
                found.append(str(path))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
            continue  # corrupted, or not of a training
    return found


def last_checkpoint(trainer: L.Trainer) -> ModelCheckpoint | None:
    """The callback whose ``last.ckpt`` a run can be resumed from; None where nothing is written."""
    found = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and not c.save_weights_only)
    return None if trainer.fast_dev_run else next(found, None)


def save_last(trainer: L.Trainer) -> None:
    """Write ``last.ckpt`` now, as ModelCheckpoint does."""
    if (callback := last_checkpoint(trainer)) is not None:
        configured, callback.save_last = callback.save_last, True
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        callback.save_last = configured


class ExactResume(StopSignals, Checkpoint):
    """Makes a resumed ``fit`` end where the uninterrupted one does, however often and wherever it was stopped.

    - Place: Lightning's counters of epochs and batches differ by the hook that wrote the checkpoint, and after a resume at the
      end of an epoch they are one off in what is written next. Here all follow from the two that no hook leaves open (epochs
      started, batches processed). A validation that was due at the checkpoint is run first. At the end of an epoch the loader's
      state is dropped, so batch size and devices may change there.
    - Random numbers: torch is seeded before every training step with a function of (seed, rank, epoch, batch).
    - Signals: SIGTERM, SIGINT (Ctrl-C) and SIGHUP write a checkpoint after the current step or validation, and say how to
      resume; SIGUSR1 under SLURM writes Lightning's and requeues the job. Within a step, where Lightning writes it, the current
      batch would count as seen, accumulated gradients would be lost, and devices could be at different steps.

    A finished run has a checkpoint of its end, which a longer run resumes from. A run that is resumed from a checkpoint of its
    own folder replaces ``last.ckpt``, also where the folder was copied or options of ModelCheckpoint changed.
    ``calib-guidance fit`` always has this callback, as the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = None
        self._validated: tuple[int, int] | None = None  # place of the last validation
        self._saved: tuple[int, int, bool] | None = None  # place of the last checkpoint
        self._validation_due = self._between_epochs = False

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    @staticmethod
    def _place(trainer: L.Trainer) -> tuple[int, int]:
        """Epochs started, and batches processed in all."""
        loop = trainer.fit_loop
        return loop.epoch_progress.current.started, loop.epoch_loop.batch_progress.total.processed

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether a validation is to come before the next batch."""
        loop = trainer.fit_loop
        return self._validated != self._place(trainer) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = self._place(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        due = self._validation_due or self._is_due(trainer)
        self._saved = (*self._place(trainer), due)
        for logger in trainer.loggers:
            logger.save()  # a run that resumes from here continues the logs
        versions = {type(logger).__name__: logger.version for logger in trainer.loggers}
        checkpoint[_STATE] = {"validation_due": due, "logger_versions": versions}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "loops" not in checkpoint:
            raise ConfigurationError(
                f"--ckpt_path: {trainer.ckpt_path} holds weights without the state of a run: name it as the classifier's or the "
                "network's weights in the YAML instead"
            )
        loops = checkpoint["loops"]["fit_loop"]
        self._between_epochs = _at_epoch_end(loops)
        self._validation_due = checkpoint.get(_STATE, {}).get("validation_due", False)
        self._set_place(loops, trainer.accumulate_grad_batches)
        steps = loops[_STEPS]["optimizer"]["step"]["total"]["completed"]
        self._max_steps = trainer.max_steps
        if 0 <= trainer.max_steps <= steps:
            # A run that was stopped after its last step still has to validate and to export, and without a step to go Lightning
            # calls no hook. Taken back in on_train_start.
            trainer.fit_loop.epoch_loop.max_steps = steps + 1
        if self._between_epochs:
            loops["state_dict"].pop("combined_loader", None)
        folder = Path(trainer.ckpt_path).absolute().parent
        for state in loops["state_dict"].get("combined_loader", []):
            state["at_epoch_end"] = lambda: epoch_end_checkpoints(folder)
        written = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        self._own = folder in {Path(path).absolute() for path in (trainer.default_root_dir, *filter(None, written))}
        if self._own:
            self._move(trainer, checkpoint["callbacks"])

    @staticmethod
    def _set_place(loops: dict[str, Any], accumulate: int) -> None:
        """Set all counters as they are in ``on_train_batch_end`` of the last batch that was processed."""
        epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        last, started = batch["is_last_batch"], epoch["current"]["started"]
        done, total = batch["current"]["processed"], batch["total"]["processed"]
        if not done and started > 1:  # nothing of the epoch that has started
            last, started, done = True, started - 1, 1
        for counts in (epoch["total"], epoch["current"]):
            counts |= {"ready": started, "started": started, "processed": started - 1, "completed": started - 1}
        for counts, number in ((batch["total"], total), (batch["current"], done)):
            counts |= {"ready": number, "started": number, "processed": number, "completed": max(number - 1, 0)}
        batch["is_last_batch"] = last
        for counts in (loops["epoch_loop.val_loop.batch_progress"][key] for key in ("total", "current")):
            counts |= dict.fromkeys(counts, 0)
        steps = loops[_STEPS]["optimizer"]["step"]["total"]["completed"]
        # Of the loggers; Lightning adds the step of the last batch.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - int(last or done % accumulate == 0)

    @staticmethod
    def _move(trainer: L.Trainer, states: dict[str, Any]) -> None:
        """Make the paths that ModelCheckpoint remembers those of the folder that it writes to now."""
        for callback in trainer.checkpoint_callbacks:
            if not (isinstance(callback, ModelCheckpoint) and (state := states.get(callback.state_key))):
                continue

            def moved(path: str, folder: str = callback.dirpath) -> str:
                return path and str(Path(folder, Path(path).name))

            state["dirpath"] = callback.dirpath
            state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = moved(state[key])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        usr1 = signal.getsignal(signal.SIGUSR1)
        self.install(trainer)
        if self.requeue_handler is None:
            signal.signal(signal.SIGUSR1, usr1)
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())))
        if trainer.ckpt_path is not None:
            self._resume(trainer, pl_module)

    def _resume(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps = self._max_steps
        if self._own and (callback := last_checkpoint(trainer)) is not None:
            callback.last_model_path = callback.last_model_path or str(Path(callback.dirpath, "last.ckpt"))
        if self._validation_due:
            self._validate(trainer)
        for each in trainer.checkpoint_callbacks:
            if isinstance(each, ModelCheckpoint):  # would save again after the next batch, amid its accumulation
                each._last_global_step_saved = trainer.global_step
        if self._between_epochs:
            # A new epoch follows, so nothing restarts: Lightning would continue the counters of the epoch that has ended.
            loop.epoch_loop._batches_that_stepped = trainer.global_step
            for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
                each.on_iteration_done()
        elif trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.on_train_epoch_start(trainer, pl_module)  # sets the total

    def _validate(self, trainer: L.Trainer) -> None:
        """Run the validation that was due, in the epoch that it belongs to."""
        progress, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
        progress.completed -= self._between_epochs
        trainer.validating, self._validation_due = True, False
        loop.val_loop.run()
        trainer.training = True
        save_last(trainer)
        progress.completed += self._between_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop
        done = loop.epoch_progress.current.processed
        over = 0 <= trainer.max_steps <= trainer.global_step or 0 <= loop.max_epochs <= done or trainer.should_stop
        if over and self._saved != (*self._place(trainer), self._is_due(trainer)):
            save_last(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # On a CPU, torch.manual_seed notes the stack for each kind of device that is not in use: longer than a small step.
        on_cpu = pl_module.device.type == "cpu"
        seed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        seed(hashed(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx))

    def noted(self) -> None:
        log.warning(f"{self.signal.name}: stopping after the current step, or after validation; again to stop at once")

    def cure(self) -> str:
        callback = last_checkpoint(self._trainer)
        path = callback and (callback._last_checkpoint_saved or callback.last_model_path)
        return f"To resume, re-run with --ckpt_path {path}" if path else "No checkpoint was written"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulated = trainer.accumulate_grad_batches
        step, rest = divmod(batch_idx + 1, accumulated)
        every = 1 if trainer.world_size == 1 else max(1, _EVERY // accumulated)
        if trainer.is_last_batch or not (rest or step % every):
            self._answer(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._trainer is not None and not trainer.sanity_checking:
            self._answer(trainer)

    def _answer(self, trainer: L.Trainer) -> None:
        """Do on all devices what a signal to any of them asks for."""
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(self.signal is not None, all=False):
            return
        requeue = self.requeue_handler is not None and self.signal in (None, signal.SIGUSR1)
        if agree(requeue, all=True):
            self.signal = None
            self.requeue_handler(signal.SIGUSR1, None)
            return
        callback = last_checkpoint(trainer)
        if callback is not None and (trainer.validating or callback._last_global_step_saved != trainer.global_step):
            save_last(trainer)
        self.signal = self.signal or signal.SIGTERM  # another device's
        raise self.stopped(f"after step {trainer.global_step}")
