"""What to denoise: images of a data set, once or several times each."""

from __future__ import annotations

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calib_guidance.data.sample_requests import check_numbers, request_loader
from calib_guidance.errors import ConfigurationError


class _Requests:
    """Apart from the data module, whose trainer no loading process needs."""

    def __init__(self, images: Dataset, draws_per_image: int, num_classes: int, seed: int):
        self.images, self.draws_per_image, self.num_classes, self.seed = images, draws_per_image, num_classes, seed

    def __len__(self) -> int:
        return self.draws_per_image * len(self.images)

    def __getitem__(self, index: int) -> dict[str, int | Tensor]:
        row = index % len(self.images)
        item = self.images[row]
        label = int(item["label"])
        if not 0 <= label < self.num_classes:
            raise ConfigurationError(
                f"data.init_args.images: image {row} has the label {label}, outside 0 … {self.num_classes - 1} "
                "(data.init_args.num_classes)"
            )
        numbers = {"index": index, "source": int(item["index"]), "label": label, "seed": self.seed}
        return numbers | {"image": item["image"]}


class DenoiseRequests(L.LightningDataModule):
    """Numbered requests ``{index, source, label, seed, image}``, in batches of consecutive indices that ranks take in turn.

    Request ``draw·len(images) + row`` is the image of that row, with step and noise of its own; ``source`` is the ``index``
    that the data set gives it.

    Args:
        images: map-style data set of dicts: ``image`` ``(C, H, W)`` in [-1, 1], ``label``, ``index``. Random augmentations
            would make the result depend on the order of work.
        num_classes: how many classes there are.
        draws_per_image: how often every image is denoised.
        seed: of every request, ≥ 0; a denoised image is a function of (configuration, seed, index) alone.
        batch_size: images per batch and device.
        num_workers: processes per device that read images; 0 reads in the main one.

    Raises:
        ConfigurationError: numbers out of range, a data set without images, or, when it is read, a label outside
            0 … num_classes − 1.
    """

    def __init__(
        self,
        images: Dataset,
        num_classes: int = 1000,
        draws_per_image: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ):
        super().__init__()
        # With fewer batches than ranks some ranks have nothing to do, which is fine here.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        check_numbers(
            num_classes=(num_classes, 1),
            draws_per_image=(draws_per_image, 1),
            seed=(seed, 0),
            batch_size=(batch_size, 1),
            num_workers=(num_workers, 0),
        )
        if not len(images):
            raise ConfigurationError("data.init_args.images: the data set holds no images")
        self.images, self.num_classes, self.draws_per_image, self.seed = images, num_classes, draws_per_image, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.requests = _Requests(images, draws_per_image, num_classes, seed)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the first image.

        Raises:
            ConfigurationError: a data set of anything but dicts of image, label and index.
        """
        item = self.images[0]
        if not (isinstance(item, dict) and {"image", "label", "index"} <= item.keys()):
            found = sorted(item) if isinstance(item, dict) else type(item).__name__
            raise ConfigurationError(
                f"data.init_args.images: expected a data set of dicts with image, label and index, got {found}"
            )
        return tuple(item["image"].shape)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict[str, int | Tensor]:
        return self.requests[index]

    def predict_dataloader(self) -> DataLoader:
        return request_loader(self.requests, self.batch_size, self.trainer, self.num_workers)
