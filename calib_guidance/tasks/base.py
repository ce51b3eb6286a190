"""Base of the modules that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn


class NoDeepcopy:
    """A callable that a deep copy of its owner shares with it.

    The callables that the command line makes of optimizers and rate schedules hold the complete command line, with trainer and
    data. A weight average copies the module, and would copy those too, which under DDP fails at a lock of the launcher's.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> NoDeepcopy:
        return self


class TrainingTask(L.LightningModule):
    """Optimizer, learning-rate schedule and the logged loss of a module that trains.

    Args:
        optimizer: builds the optimizer.
        lr_scheduler: builds the rate schedule, stepped at every optimizer step; None for a constant rate.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None):
        super().__init__()
        self.optimizer, self.lr_scheduler = NoDeepcopy(optimizer), lr_scheduler and NoDeepcopy(lr_scheduler)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> object:
        optimizer = self.optimizer(self.trained_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def on_train_start(self) -> None:
        # Not where the scheduler is made: the number of steps asks for the loader, and one that is made before the checkpoint
        # has been read never learns where in the epoch to resume.
        scheduler = self.lr_schedulers()
        if getattr(scheduler, "total_steps", 0) is None:
            scheduler.total_steps = int(self.trainer.estimated_stepping_batches)

    def log_loss(self, loss: Tensor) -> Tensor:
        """Log the loss of a training step, on the CPU in the progress bar too.

        Loggers read it every ``log_every_n_steps`` steps. A progress bar reads what it shows after each, and a GPU would have
        nothing to do until then.
        """
        self.log("train/loss", loss, prog_bar=self.device.type == "cpu")
        return loss
