"""Checkpoints that resume to what an uninterrupted ``fit`` does, wherever it was stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from calib_guidance.callbacks.loggers import STATE
from calib_guidance.errors import ConfigurationError

_STEPS = "epoch_loop.automatic_optimization.optim_progress"


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


def save_last(trainer: L.Trainer) -> str | None:
    """Write ``last.ckpt`` now, as ModelCheckpoint does; returns its path, or None where nothing is written."""
    if (callback := last_checkpoint(trainer)) is None:
        return None
    configured, callback.save_last = callback.save_last, True
    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    callback.save_last = configured
    return callback.last_model_path


class ExactResume(Checkpoint):
    """Makes a resumed ``fit`` end where the uninterrupted one does, however often and wherever it was stopped.

    Lightning's counters of epochs and batches differ by the hook that wrote the checkpoint, and after a resume at the end of an
    epoch they are one off in what is written next: resumed again, such a run trains steps that it has trained. Here the place is
    read from the two counters that no hook leaves open (epochs started, batches processed), and all others follow from it.
    A validation that was due at the checkpoint is run first. At the end of an epoch the loader's state is dropped, so batch
    size and devices may change there.

    A finished run has a checkpoint of its end, which a longer run resumes from. A run that is resumed from a checkpoint of its
    own folder replaces ``last.ckpt``, also where the folder was copied or options of ModelCheckpoint changed.

    ``calib-guidance fit`` always has this callback, as the last one.
    """

    def __init__(self) -> None:
        self._validated: tuple[int, int] | None = None  # place of the last validation
        self._saved: tuple[int, int, bool] | None = None  # place of the last checkpoint
        self._validation_due = False
        self._between_epochs = False

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
        checkpoint[STATE] = {"validation_due": due, "logger_versions": versions}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "loops" not in checkpoint:
            raise ConfigurationError(
                f"--ckpt_path: {trainer.ckpt_path} holds weights without the state of a run: name it as the classifier's or the "
                "network's weights in the YAML instead"
            )
        loops = checkpoint["loops"]["fit_loop"]
        self._between_epochs = _at_epoch_end(loops)
        self._validation_due = checkpoint.get(STATE, {}).get("validation_due", False)
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
        self._own = folder in {Path(trainer.default_root_dir).absolute(), *self._folders(trainer)}
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
    def _folders(trainer: L.Trainer) -> list[Path]:
        return [Path(c.dirpath).absolute() for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]

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
        if trainer.ckpt_path is None:
            return
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps = self._max_steps
        if self._own and (callback := last_checkpoint(trainer)) is not None:
            callback.last_model_path = callback.last_model_path or str(Path(callback.dirpath, "last.ckpt"))
        if self._validation_due:
            self._validate(trainer)
        for each in trainer.checkpoint_callbacks:
            if isinstance(
                each, ModelCheckpoint
            ):  # else it would save again after the next batch, amid its accumulation
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
