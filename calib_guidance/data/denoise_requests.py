"""What to denoise: images of a data set, once or several times each."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from calib_guidance.data.loading import SkippedImages, take_reports
from calib_guidance.data.sample_requests import RequestData, check_numbers
from calib_guidance.errors import ConfigurationError


class _Requests:
    """Requests without the data module, whose trainer the reading processes do not need."""

    def __init__(self, images: Dataset, draws_per_image: int, num_classes: int, seed: int):
        self.images, self.draws_per_image, self.num_classes, self.seed = images, draws_per_image, num_classes, seed

    def __len__(self) -> int:
        return self.draws_per_image * len(self.images)

    def __getitem__(self, index: int) -> dict[str, int | Tensor]:
        row = index % len(self.images)
        item = self.images[row]
        if "corrupt" in item:
            return {"corrupt": item["corrupt"]}
        label = int(item["label"])
        if not 0 <= label < self.num_classes:
            raise ConfigurationError(
                f"data.images: image {row} has the label {label}, outside 0 … {self.num_classes - 1} (data.num_classes)"
            )
        numbers = {"index": index, "source": int(item["index"]), "label": label, "seed": self.seed}
        return numbers | {"image": item["image"]}


class DenoiseRequests(RequestData):
    """Numbered requests ``{index, source, label, seed, image}``, in shards of consecutive indices that workers take.

    Request ``draw·len(images) + row`` is the image of that row, with step and noise of its own; ``source`` is the ``index``
    that the data set gives it.

    Args:
        images: map-style data set of dicts: ``image`` ``(C, H, W)`` in [-1, 1], ``label``, ``index``. Random augmentations
            would make the result depend on the order of work.
        num_classes: how many classes there are.
        draws_per_image: how often every image is denoised.
        seed: of every request, ≥ 0; a denoised image is a function of (configuration, seed, index) alone.
        batch_size: images per batch and device.
        shard_size: images that are written together; a run that stops loses the images of unwritten shards. None takes that of
            the folder, or the batch size.
        num_workers: processes per device that read images; 0 reads in the main one.
        max_corrupt: fraction of the images that may be unreadable, in [0, 1]. They are skipped and named.

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
        shard_size: int | None = None,
        num_workers: int = 0,
        max_corrupt: float = 0.01,
    ):
        super().__init__()
        check_numbers(
            num_classes=(num_classes, 1),
            draws_per_image=(draws_per_image, 1),
            seed=(seed, 0),
            batch_size=(batch_size, 1),
            shard_size=(1 if shard_size is None else shard_size, 1),
            num_workers=(num_workers, 0),
        )
        if not 0 <= max_corrupt <= 1:
            raise ConfigurationError(f"data.max_corrupt must be in [0, 1], got {max_corrupt}")
        if not len(images):
            raise ConfigurationError("data.images: the data set holds no images")
        self.images, self.num_classes, self.draws_per_image, self.seed = images, num_classes, draws_per_image, seed
        self.batch_size, self.shard_size, self.num_workers = batch_size, shard_size, num_workers
        self.requests = _Requests(images, draws_per_image, num_classes, seed)
        self.corrupt = SkippedImages("data.images", max_corrupt)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the first image that can be read.

        Raises:
            ConfigurationError: a data set of anything but dicts of image, label and index.
        """
        item = next(
            (item for item in map(self.images.__getitem__, range(len(self.images))) if "corrupt" not in item), None
        )
        if not (isinstance(item, dict) and {"image", "label", "index"} <= item.keys()):
            found = sorted(item) if isinstance(item, dict) else type(item).__name__
            raise ConfigurationError(
                f"data.images: expected a data set of dicts with image, label and index, got {found}"
            )
        return tuple(item["image"].shape)

    def __getitem__(self, index: int) -> dict[str, int | Tensor]:
        return self.requests[index]

    def on_before_batch_transfer(self, batch: dict[str, object], dataloader_idx: int) -> dict[str, object]:
        self.corrupt.count(take_reports(batch), len(self.images))
        return batch

    def teardown(self, stage: str) -> None:
        self.corrupt.summarise()
