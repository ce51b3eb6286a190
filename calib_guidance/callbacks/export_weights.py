"""Writes what was trained in the format that ``predict`` configurations name."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from calib_guidance.errors import ConfigurationError
from calib_guidance.weights.io import save_weights


def below_root(path: str | None) -> str | None:
    """A safetensors file below the trainer's default_root_dir, as an option names it."""
    if path is not None and not path.endswith(".safetensors"):
        raise ConfigurationError(f"path: expected a .safetensors file, got {path!r}")
    if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
        raise ConfigurationError(
            f"path: exports go below trainer.default_root_dir, got {path!r}: set it to {Path(path).name}, and copy the file"
        )
    return path


class ExportWeights(L.Callback):
    """At the end of ``fit``, the network's weights (the average, where one is kept) as safetensors.

    What shapes do not tell, the module's ``weights_metadata``, is kept in the file.

    List it after the callback that averages the weights: callbacks run in the order of the list.

    Args:
        path: file to write, relative to the trainer's default_root_dir; an existing one is replaced atomically.
        module: attribute path of what to write, e.g. ``network`` or ``classifier.network``.
    """

    def __init__(self, path: str = "network.safetensors", module: str = "network"):
        self.path, self.module = below_root(path), module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.get_submodule(self.module)  # a wrong name fails before training, not after

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = Path(trainer.default_root_dir, self.path)
            save_weights(pl_module.get_submodule(self.module), path, **getattr(pl_module, "weights_metadata", {}))
            print(f"wrote {path}")
