"""The progress bar of sampling."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

_SECONDS = 0.2  # between two drawings


class SamplingProgress(TQDMProgressBar):
    """Progress bar that counts the images of all processes of this command, with fractions of a batch.

    Under DDP it shows the first rank's part.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        context, bar = pl_module.context, self.predict_progress_bar
        total = sum(map(len, context.shards)) or len(trainer.datamodule)
        bar.reset(-(-total // trainer.world_size))
        bar.unit = " images"
        self._several = f"{context.workers.count} processes" if context.workers.count > 1 else ""
        self._drawn = 0.0
        context.display(self.show)

    def show(self, done: float, text: str) -> None:
        """Show a number of images that are done, and a text."""
        bar = self.predict_progress_bar
        if bar.disable or (now := time.monotonic()) - self._drawn < _SECONDS:
            return
        self._drawn, bar.n = now, int(done)
        bar.set_postfix_str(", ".join(filter(None, (text, self._several))))

    # The hooks of the base class count batches.
    def on_predict_batch_start(self, *_: Any) -> None:
        pass

    def on_predict_batch_end(self, *_: Any) -> None:
        pass

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar = self.predict_progress_bar
        bar.n = int(pl_module.context.workers.total())
        bar.set_postfix_str(self._several)
        super().on_predict_end(trainer, pl_module)
