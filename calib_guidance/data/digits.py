"""The handwritten digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits), 8×8 grey."""

from __future__ import annotations

import functools

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NUM_CLASSES = 10
HELDOUT_PER_CLASS = 50


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.long)
    # The split is part of the data: it depends on no seed of a run. Drawn per class, so that both parts hold every class.
    generator = torch.Generator().manual_seed(2310_11311)
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().flatten()
        heldout[members[torch.randperm(len(members), generator=generator)[:HELDOUT_PER_CLASS]]] = True
    return images, labels, heldout


def digits(split: str) -> tuple[Tensor, Tensor]:
    """One part of the digits: ``train`` (1,297 images) or ``heldout`` (500, 50 of each class), the same on every machine.

    Networks are trained on ``train`` only and evaluations refer to ``heldout`` only.

    Returns:
        Images ``(N, 1, 8, 8)`` float32 in [-1, 1] (17 grey levels) and labels ``(N,)``.

    Raises:
        ValueError: another name.
    """
    images, labels, heldout = _digits()
    if split not in ("train", "heldout"):
        raise ValueError(f"digits: unknown split {split!r}; known: train, heldout")
    chosen = heldout if split == "heldout" else ~heldout
    return images[chosen], labels[chosen]


class DigitImages(Dataset):
    """One part of the digits as a data set of {image, label, index}, see :func:`digits`.

    Args:
        split: ``train`` or ``heldout``.
    """

    def __init__(self, split: str = "heldout"):
        self.images, self.labels = digits(split)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index], "index": torch.tensor(index)}


def random_affine(images: Tensor, generator: torch.Generator | None, degrees: float, shift: float) -> Tensor:
    """Each image turned and moved on its own.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1]; what comes in from outside is -1.
        degrees: largest rotation.
        shift: largest move, as a share of the side.
    """
    n = len(images)
    angle, dx, dy = (torch.rand(3, n, generator=generator) * 2 - 1).to(images.device)
    angle = angle * degrees * torch.pi / 180
    rows = torch.stack([angle.cos(), -angle.sin(), 2 * shift * dx, angle.sin(), angle.cos(), 2 * shift * dy], dim=1)
    grid = torch.nn.functional.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


class Digits(L.LightningDataModule):
    """Training and held-out digits for ``fit``, as batches of {image in [-1, 1], label, index}.

    Args:
        batch_size: samples per step and device.
        rotate: largest random rotation while training, in degrees.
        shift: largest random move while training, as a share of the side.
    """

    def __init__(self, batch_size: int = 128, rotate: float = 0.0, shift: float = 0.0):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.rotate, self.shift = batch_size, rotate, shift
        self.num_classes, self.image_shape = NUM_CLASSES, (1, 8, 8)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DigitImages("train"), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(DigitImages("heldout"), 250)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training and (self.rotate or self.shift):
            batch["image"] = random_affine(batch["image"], None, self.rotate, self.shift)
        return batch
