"""Training checkpoints that survive being interrupted while they are written."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.weights.io import CheckpointError


def _whole(path: Path) -> bool:
    """Whether every part of a checkpoint can be read and has the checksum that was stored with it."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def previous_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint that ``path`` replaced is kept."""
    return Path(f"{path}.previous")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and keeps the one that it replaces.

    A checkpoint goes to a temporary file beside its place, is forced to the disk and renamed; the one that was there before
    stays as ``NAME.previous``. Loading one that is truncated or damaged takes the previous one, with a warning.
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
            self._keep(path)

    @staticmethod
    def _keep(path: Path) -> None:
        """Keep the checkpoint at ``path`` as the previous one, without a moment in which ``path`` is missing."""
        if not zipfile.is_zipfile(
            path
        ):  # nothing there, or a truncated one, which must not replace a good previous one
            return
        link = Path(f"{path}.{os.getpid()}.link")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, previous_checkpoint(path))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        weights_only = True if weights_only is None else weights_only  # an address would be unpickled otherwise
        if "://" in str(path) or not Path(path).exists() or _whole(Path(path)):
            return super().load_checkpoint(path, map_location, weights_only)
        previous = previous_checkpoint(path)
        if not _whole(previous):
            raise CheckpointError(
                f"{path} is truncated or damaged, and there is no earlier one to fall back to ({previous}): remove it and "
                "start the run again without --ckpt_path"
            )
        rank_zero_warn(f"{path} is truncated or damaged: continuing from the checkpoint before it, {previous}")
        return super().load_checkpoint(previous, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        super().remove_checkpoint(path)
        if "://" not in str(path):
            previous_checkpoint(path).unlink(missing_ok=True)
