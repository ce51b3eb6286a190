"""What the modules that train have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor


class Shared:
    """A callable that a deep copy of its owner shares with it.

    The callables that the command line makes of optimizers and rate schedules hold the whole command line, with trainer and
    data. A weight average copies the module, and would copy those too, which under DDP fails at a lock of the launcher's.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


def log_loss(module: L.LightningModule, loss: Tensor) -> None:
    """Log the loss of a training step, on the CPU in the progress bar too.

    Loggers read it every ``log_every_n_steps`` steps. A progress bar reads what it shows after each, and a GPU would have
    nothing to do until then.
    """
    module.log("train/loss", loss, prog_bar=module.device.type == "cpu")
