"""The handwritten digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits), 8×8 gray."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calib_guidance.data.loading import DataModule, check_at_least, hashed, heldout_loader, run_seed, train_loader
from calib_guidance.errors import check_choice

DigitSplit = Literal["train", "heldout", "fitting", "validation"]
_NUM_CLASSES = 10
_HELDOUT_PER_CLASS = 50
_FITTING = 1000  # of the training digits; the others choose something: a checkpoint, a temperature


@functools.cache
def _digits() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """All images and labels, and the rows of each split."""
    # The file of sklearn.datasets.load_digits, without the import of scikit-learn, SciPy and pandas.
    folder = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(folder / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    images = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(rows[:, -1]).long()
    # The split is part of the data: it depends on no seed of a run. Drawn per class, so that both parts hold every class.
    generator = torch.Generator().manual_seed(2310_11311)
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(_NUM_CLASSES):
        members = (labels == label).nonzero().flatten()
        heldout[members[torch.randperm(len(members), generator=generator)[:_HELDOUT_PER_CLASS]]] = True
    train = (~heldout).nonzero().flatten()
    shuffled = train[torch.randperm(len(train), generator=generator)]
    fitting, validation = (part.sort().values for part in (shuffled[:_FITTING], shuffled[_FITTING:]))
    rows = {"train": train, "heldout": heldout.nonzero().flatten(), "fitting": fitting, "validation": validation}
    return images, labels, rows


def digits(split: DigitSplit) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)`` float32 in [-1, 1] (17 gray levels) and labels ``(N,)`` of a part, the same on every machine.

    ``train`` (1,297 images) and ``heldout`` (500, 50 of each class): networks are trained on the first only and evaluations
    refer to the second only. ``fitting`` (1,000) and ``validation`` (297) are the two parts of ``train``.
    """
    images, labels, rows = _digits()
    check_choice("split", split, rows)
    return images[rows[split]], labels[rows[split]]


class DigitImages(Dataset):
    """A part of :func:`digits`, items ``{image, label, index}``; each of ``draws`` has an index and noise of its own.

    Examples:
        >>> data = DigitImages("heldout")  # 50 images of each class
        >>> len(data), data[0]["image"].shape, int(data.labels.bincount()[3])
        (500, torch.Size([1, 8, 8]), 50)
    """

    def __init__(self, split: DigitSplit = "heldout", draws: int = 1):
        self.images, self.labels = digits(split)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.images) * self.draws

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index % len(self.images)
        return {"image": self.images[row], "label": self.labels[row], "index": index}


def affine(images: Tensor, draws: Tensor, degrees: float, shift: float) -> Tensor:
    """Each image ``(N, C, H, W)`` in [-1, 1] turned and moved on its own; what comes in from outside is -1.

    By at most ``degrees`` and the fraction ``shift`` of the side, as ``draws`` ``(N, 3)`` in [0, 1) say of angle and moves.
    """
    angle, dx, dy = (draws.t() * 2 - 1).contiguous()
    angle = angle * degrees * torch.pi / 180
    rows = torch.stack([angle.cos(), -angle.sin(), 2 * shift * dx, angle.sin(), angle.cos(), 2 * shift * dy], dim=1)
    grid = torch.nn.functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


class Digits(DataModule):
    """Digits for ``fit``, ``validate`` and ``test``, as batches of ``{image, label, index}``.

    Args:
        batch_size: samples per step and device.
        rotate: largest random rotation while training, in degrees.
        shift: largest random move while training, as a fraction of the side.
        train_split: what is trained on, see :func:`digits`.
        val_split: what is validated on.
        test_split: what is tested on.
        heldout_draws: times that each image is validated and tested with, each time with another noise.
        seed: of order and augmentation; None takes that of ``seed_everything``.

    Examples:
        >>> data = Digits(seed=0)
        >>> data.setup("validate")
        >>> sum(len(batch["label"]) for batch in data.val_dataloader())
        500
    """

    def __init__(
        self,
        batch_size: int = 128,
        rotate: float = 0.0,
        shift: float = 0.0,
        train_split: DigitSplit = "train",
        val_split: DigitSplit = "heldout",
        test_split: DigitSplit = "heldout",
        heldout_draws: int = 1,
        seed: int | None = None,
    ):
        super().__init__()
        check_at_least(1, batch_size=batch_size, heldout_draws=heldout_draws)
        self.batch_size, self.rotate, self.shift, self.heldout_draws = batch_size, rotate, shift, heldout_draws
        self.train_split, self.val_split, self.test_split, self.seed = train_split, val_split, test_split, seed
        self.num_classes, self.image_shape = _NUM_CLASSES, (1, 8, 8)

    def train_dataloader(self) -> DataLoader:
        return train_loader(DigitImages(self.train_split), self.batch_size, run_seed(self.seed), *self.place)

    def val_dataloader(self) -> DataLoader:
        return heldout_loader(DigitImages(self.val_split, self.heldout_draws), 250, *self.place)

    def test_dataloader(self) -> DataLoader:
        return heldout_loader(DigitImages(self.test_split, self.heldout_draws), 250, *self.place)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training and (self.rotate or self.shift):
            # A function of seed, epoch and batch, so that a resumed run turns its digits as an uninterrupted one. Drawn here,
            # where the index can be read without waiting for a GPU.
            key = hashed(run_seed(self.seed), self.trainer.current_epoch, int(batch["index"][0]))
            draws = torch.rand(3, len(batch["index"]), generator=torch.Generator().manual_seed(key))
            batch["draws"] = draws.t().contiguous()
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if "draws" in batch:
            batch["image"] = affine(batch["image"], batch.pop("draws"), self.rotate, self.shift)
        return batch
