"""Averages of the weights from which any other is made after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from calib_guidance.errors import ConfigurationError
from calib_guidance.training.ema import IMAGES, STD, decay, exponent_of_std, update
from calib_guidance.weights.io import save_weights


class PostHocEMA(L.Callback):
    """Keeps power-function averages in ``fit`` and writes snapshots of them (arXiv 2312.02696).

    ``calib-guidance ema FOLDER --std 0.08`` makes an average of another length of them. Snapshots are float16 safetensors; the
    last is written at the end of training. The averages are part of the checkpoints.

    Args:
        stds: relative lengths that are kept; two are enough.
        every_n_images: images between snapshots; EDM2 takes 8,388,608, 256 snapshots of a training.
        folder: for the snapshots, below the trainer's default_root_dir.
        module: attribute path of what is averaged.
    """

    def __init__(
        self,
        stds: Sequence[float] = (0.05, 0.1),
        every_n_images: int = 1 << 23,
        folder: str = "ema",
        module: str = "network",
    ):
        if every_n_images < 1:
            raise ConfigurationError(f"every_n_images must be at least 1, got {every_n_images}")
        if not stds:
            raise ConfigurationError("stds: name at least one length, such as 0.05")
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ConfigurationError(f"folder: snapshots go below trainer.default_root_dir, got {folder!r}")
        for std in stds:
            exponent_of_std(std)
        self.stds, self.every_n_images, self.folder, self.module = tuple(stds), every_n_images, folder, module
        self.images, self._pending, self._step, self._written = 0, 0, 0, 0
        self.averages: dict[str, dict[str, Tensor]] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(folder=self.folder)  # one training may keep several

    def _state(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in pl_module.get_submodule(self.module).state_dict().items()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.get_submodule(self.module)  # a wrong name fails before training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = self._state(pl_module)
        self._step = trainer.global_step
        for std in self.stds:
            kept = self.averages.get(str(std), state)
            self.averages[str(std)] = {name: kept[name].to(value.device, copy=True) for name, value in state.items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self._pending += len(next(iter(batch.values()))) * trainer.world_size
        if trainer.global_step == self._step:  # gradients are accumulated
            return
        self.images, size, self._pending, self._step = (
            self.images + self._pending,
            self._pending,
            0,
            trainer.global_step,
        )
        state = self._state(pl_module)
        for std in self.stds:
            update(self.averages[str(std)], state, decay(std, self.images, size))
        if self.images // self.every_n_images > (self.images - size) // self.every_n_images:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.images and self.images != self._written:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = self.images
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        metadata = getattr(pl_module, "weights_metadata", {})
        for std in self.stds:
            state = {n: v.half() if v.is_floating_point() else v for n, v in self.averages[str(std)].items()}
            path = Path(trainer.default_root_dir, self.folder, f"{self.images:012d}-{std:g}.safetensors")
            save_weights(state, path, **metadata, **{STD: std, IMAGES: self.images})

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "written": self._written, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if {*state["averages"]} - {str(std) for std in self.stds} or (state["images"] and not state["averages"]):
            raise ConfigurationError(
                f"the checkpoint has averages of lengths {', '.join(state['averages'])}, the configuration {self.stds}: set stds "
                "to those, or train from the start"
            )
        self.images, self._written, self.averages = state["images"], state["written"], state["averages"]
