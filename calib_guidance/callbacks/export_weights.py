"""Writes what was trained in the format that ``predict`` configurations name."""

from __future__ import annotations

import lightning as L

from calib_guidance.weights.io import save_weights


class ExportWeights(L.Callback):
    """At the end of ``fit``, the network's weights (the average, where one is kept) as safetensors.

    What shapes do not tell, the module's ``weights_metadata``, is kept in the file.

    List it after the callback that averages the weights: callbacks run in the order of the list.

    Args:
        path: file to write; an existing one is replaced, and only by a complete one.
        module: attribute path of what to write, e.g. ``network`` or ``classifier.network``.
    """

    def __init__(self, path: str, module: str = "network"):
        self.path, self.module = path, module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.get_submodule(self.module)  # a wrong name fails before training, not after

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            save_weights(pl_module.get_submodule(self.module), self.path, **getattr(pl_module, "weights_metadata", {}))
            print(f"wrote {self.path}")
