"""Training checkpoints that survive an interruption while they are written."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from calib_guidance.backend.atomic import atomic_write, link_or_copy
from calib_guidance.weights.io import CheckpointError


def _is_sound(path: Path) -> bool:
    """Whether every part of a checkpoint can be read and has the checksum that was stored with it."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def previous_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Path of the checkpoint that ``path`` replaced."""
    return Path(f"{path}.previous")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and keeps the one that is replaced as ``NAME.previous``.

    If a checkpoint fails its checksums, loading warns and takes the previous one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # remote storage replaces objects atomically
            return
        path = Path(path)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()  # a full disk shows here, before the previous checkpoint goes
            if zipfile.is_zipfile(path):  # a truncated one must not replace a good previous one
                link_or_copy(path, previous_checkpoint(path))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        weights_only = True if weights_only is None else weights_only  # an address would be unpickled otherwise
        if "://" in str(path) or not Path(path).exists() or _is_sound(Path(path)):
            return super().load_checkpoint(path, map_location, weights_only)
        previous = previous_checkpoint(path)
        if not _is_sound(previous):
            raise CheckpointError(
                f"{path} is corrupted, and there is no previous checkpoint ({previous}): remove it and restart the run without "
                "--ckpt_path"
            )
        rank_zero_warn(f"{path} is corrupted: resuming from the previous checkpoint, {previous}")
        return super().load_checkpoint(previous, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        super().remove_checkpoint(path)
        if "://" not in str(path):
            previous_checkpoint(path).unlink(missing_ok=True)
