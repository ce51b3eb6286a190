"""Random numbers of training that a restart does not change."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch

from calib_guidance.data.loading import hashed


class StepSeeds(L.Callback):
    """Seeds torch's generators before every training step with a function of (seed, rank, epoch, batch).

    A resumed run draws the same noise and dropout as the uninterrupted one, whatever else has used the generators in between.
    ``calib-guidance fit`` always has this callback.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
            self.seed = trainer.strategy.broadcast(self.seed)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(hashed(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
