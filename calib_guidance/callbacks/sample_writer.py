"""Writes samples as they are made."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from calib_guidance.callbacks.figures import draw_grid
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.errors import ConfigurationError
from calib_guidance.images import UINT8_RULES, to_uint8


def _png(image: np.ndarray) -> bytes:
    """PNG of a uint8 image ``(C, H, W)``, grey or RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def read_samples(folder: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
    """Written samples, file by file in order of index.

    Yields:
        ``image`` uint8 ``(N, C, H, W)`` and every other column ``(N,)``: ``index``, ``label``, ``seed`` …
    """
    for path in sorted(Path(folder).glob("*.parquet")):
        table = pq.read_table(path).to_pydict()
        images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table.pop("image")]
        stacked = torch.from_numpy(np.stack([i[None] if i.ndim == 2 else i.transpose(2, 0, 1) for i in images]))
        yield {"image": stacked, **{key: torch.tensor(column) for key, column in table.items()}}


class SampleWriter(Measurement):
    """Writes every batch at its end as one parquet file: its columns of whole numbers (index, label, seed …) and PNG images.

    The images are what the module's predict step returns, alone or as ``image`` beside further columns.
    ``datasets.load_dataset("parquet", data_files="…/samples/*.parquet")`` reads them. A file is there whole or not at all.

    Args:
        folder: where to; ``samples`` in the trainer's default_root_dir by default.
        uint8_rule: see :func:`calib_guidance.images.to_uint8`.
        overwrite: remove the samples of an earlier run in the folder first; otherwise they are an error.

    Raises:
        ConfigurationError: an unknown rule; before sampling, a folder that cannot be written or holds samples.
    """

    def __init__(self, folder: str | None = None, uint8_rule: str = "truncate", overwrite: bool = False):
        if uint8_rule not in UINT8_RULES:
            raise ConfigurationError(f"uint8_rule: unknown {uint8_rule!r}; known: {', '.join(UINT8_RULES)}")
        self.folder, self.uint8_rule, self.overwrite = folder, uint8_rule, overwrite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        pl_module.check()  # nothing of an earlier run is touched for a configuration that cannot run
        self.path = self.target(trainer)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"the output folder {self.path} cannot be written ({error.strerror or error}): set trainer.default_root_dir "
                "to one that can"
            ) from error
        old = self.old_samples(trainer)
        trainer.strategy.barrier("old samples seen")
        if trainer.is_global_zero:
            for path in old:
                path.unlink()
        trainer.strategy.barrier("old samples removed")

    def target(self, trainer: L.Trainer) -> Path:
        """The folder that samples go to."""
        return Path(self.folder or os.path.join(trainer.default_root_dir, "samples"))

    def old_samples(self, trainer: L.Trainer) -> list[Path]:
        """Files of an earlier run in that folder, to be replaced.

        Raises:
            ConfigurationError: there are some, and they may not be.
        """
        folder = self.target(trainer)
        old = sorted(folder.glob("*.parquet"))
        if old and not self.overwrite:
            raise ConfigurationError(
                f"{folder} already holds samples ({old[0].name} …): set trainer.default_root_dir to another folder, or the "
                "SampleWriter's overwrite to true to replace them"
            )
        return old

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = batch | (outputs if isinstance(outputs, dict) else {"image": outputs})
        images = to_uint8(rows.pop("image"), self.uint8_rule).cpu().numpy()
        columns = {key: column.tolist() for key, column in rows.items()}
        features = datasets.Features({key: datasets.Value("int64") for key in columns} | {"image": datasets.Image()})
        columns["image"] = [{"bytes": _png(image), "path": None} for image in images]
        name = f"{columns['index'][0]:08d}-{columns['index'][-1]:08d}.parquet"
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        pq.write_table(pa.Table.from_pydict(columns, schema=features.arrow_schema), temporary)
        os.replace(temporary, self.path / name)

    def results(self, trainer: L.Trainer) -> dict[str, object]:
        return {"uint8_rule": self.uint8_rule}

    def draw(self, folder: Path, trainer: L.Trainer) -> list[Path]:
        return [draw_grid(read_samples(self.path), folder / "samples.png")]
