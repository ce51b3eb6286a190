"""Images of the hub, of a folder or of parquet and arrow files, for ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader

from calib_guidance.data import loading
from calib_guidance.data.base import ImageSource, SourceOptions, listed
from calib_guidance.data.image_datasets import ImageReader, ImageRows, ImageStream
from calib_guidance.data.imagenet import imagenet_labels, imagenet_names
from calib_guidance.data.loading import check_at_least
from calib_guidance.data.source import open_source
from calib_guidance.errors import ConfigurationError

log = logging.getLogger(__name__)

_MODES = {1: "L", 3: "RGB"}
_STREAM_SHARDS = 8  # of local data, for each process that reads
_ENOUGH_SEEN = 500  # images of a stream, before a fraction of them means anything


class ImageData(loading.DataModule):
    """Images in [-1, 1] with labels, as batches ``{"image", "label", "index"[, "t"]}``.

    Held-out images are resized so that the shorter side is ``image_size`` (bicubic, antialiased) and cropped in the middle, as
    ADM's training images. :mod:`calib_guidance.data.preprocess` states how files are decoded. What an image is cropped to depends
    on (seed, epoch, index) alone, and a run that is killed and resumed sees the rest of its epoch.

    Args:
        source: a hub id (``ILSVRC/imagenet-1k``); a folder with a folder for each split (train, validation or val, test) with one
            of images for each class, see :class:`~calib_guidance.data.source.FolderImages`; a folder or pattern of parquet or
            arrow files (``data/{split}-*.parquet``); or a folder that ``save_to_disk`` of datasets wrote.
        image_size: side of the square images.
        batch_size: images per step and device.
        num_workers: processes that read, per device.
        train_split: to train on, such as ``train`` or ``train[:90%]``. Parts have the same fraction of every class.
        val_split: to validate on, such as ``validation`` or ``train[90%:]``.
        test_split: to test on; None takes ``val_split``.
        subset: of a hub data set that has several.
        streaming: read from beginning to end, instead of a copy in the cache that is read by row number. Tables are then
            validated in their own order: of one that is sorted by class, ``limit_val_batches`` leaves the first classes.
        shuffle_buffer: images of a stream that are shuffled at a time, in each worker.
        samples_per_epoch: of a stream, over all devices; None takes the number that the data set states.
        train_transform: a module of ``torchvision.transforms.v2`` that makes 8-bit images ``(C, H, W)`` into 8-bit images of
            ``image_size``; None is a random flip and crop of a quarter of the area or more, resized (bicubic, antialiased).
        classes: ``imagenet`` renumbers labels by name into torchvision's order of ImageNet's 1,000 classes, which any number of
            them is enough for; None keeps the numbers of the training split.
        num_classes: for data sets whose labels have no names; None takes the model's.
        image_column: name of that column of a table; None looks for the usual names (image, img, …).
        label_column: name of that column of a table; None looks for the usual names (label, fine_label, …).
        time_column: of the diffusion step t of denoised images; None where they have none.
        index_column: of the number that an image keeps in every order; None takes the row number, for streams a hash of the file.
        channels: 3 for RGB, 1 for gray.
        max_corrupt: fraction of images that may be unreadable, in [0, 1]. They are named and skipped; while training, others
            stand in for them. Each device counts its own.
        seed: of order and crops, ≥ 0; None takes that of ``seed_everything``, or 0.
        heldout_draws: how often each held-out image comes, with a new index each time, so that it is seen with more noise.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for name in ("train/cat", "train/dog", "validation/cat", "validation/dog"):
        ...     Path("images", name).mkdir(parents=True)
        ...     Image.new("RGB", (40, 32)).save(f"images/{name}/1.png")
        >>> data = ImageData("images", image_size=32, batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch["image"].shape, batch["label"].tolist()  # cat, dog
        (torch.Size([2, 3, 32, 32]), [0, 1])
    """

    def __init__(
        self,
        source: str,
        image_size: int,
        batch_size: int = 64,
        num_workers: int = 0,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        subset: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        samples_per_epoch: int | None = None,
        train_transform: nn.Module | None = None,
        classes: Literal["imagenet"] | None = None,
        num_classes: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        time_column: str | None = None,
        index_column: str | None = None,
        channels: Literal[1, 3] = 3,
        max_corrupt: float = 0.01,
        seed: int | None = None,
        heldout_draws: int = 1,
    ):
        from torchvision.transforms import InterpolationMode, v2

        super().__init__()
        check_at_least(1, image_size=image_size, batch_size=batch_size, shuffle_buffer=shuffle_buffer)
        check_at_least(1, samples_per_epoch=samples_per_epoch, num_classes=num_classes, heldout_draws=heldout_draws)
        check_at_least(0, num_workers=num_workers, seed=seed)
        if channels not in _MODES:
            raise ConfigurationError(f"data.channels must be 1 or 3, got {channels}")
        if classes not in (None, "imagenet"):
            raise ConfigurationError(f"data.classes must be imagenet or null, got {classes!r}")
        if samples_per_epoch is not None and not streaming:
            raise ConfigurationError("data.samples_per_epoch is for streams: set data.streaming, or leave it out")
        self.source, self.streaming = source, streaming
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        columns = (image_column, label_column, time_column, index_column)
        self.options = SourceOptions(source, None, subset, *columns, of_data=True)
        self.image_shape = (channels, image_size, image_size)
        self.batch_size, self.num_workers, self.heldout_draws = batch_size, num_workers, heldout_draws
        self.shuffle_buffer, self.samples_per_epoch = shuffle_buffer, samples_per_epoch
        self.classes, self.num_classes, self.class_names = classes, num_classes, None
        self.seed = loading.run_seed(seed)
        resize = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        usual = [v2.RandomResizedCrop(image_size, scale=(0.25, 1.0), **resize), v2.RandomHorizontalFlip()]
        self.train_transform = train_transform or v2.Compose(usual)
        self.heldout_transform = v2.Compose([v2.Resize(image_size, **resize), v2.CenterCrop(image_size)])
        self._opened: dict[str, ImageSource] = {}
        self._data: dict[str, ImageRows | ImageStream] = {}
        self._seen = dict.fromkeys(self.splits, 0)
        self._corrupt = {use: loading.SkippedImages(self._where(use), max_corrupt) for use in self.splits}

    def prepare_data(self) -> None:
        """Fill the cache of datasets, once for all devices of a machine."""
        if not self.streaming:
            for split in dict.fromkeys(self.splits.values()):
                self._open(split)

    def setup(self, stage: str) -> None:
        """Open the splits of a stage."""
        used = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        reference = self._open(self.splits["train"])  # for the class names, whatever the stage
        self._number_classes(reference.class_names)
        for use in used:
            if use not in self._data:
                source = reference if use == "train" else self._open(self.splits[use])
                rank_zero_info(source.summary())
                self._data[use] = self._dataset(use, source, reference.class_names)

    def _where(self, use: str) -> str:
        return f"{self.source}, split {self.splits[use]!r}"

    def _open(self, split: str) -> ImageSource:
        if split not in self._opened:
            source = open_source(replace(self.options, split=split), "stream" if self.streaming else "random")
            if not source.labelled:
                raise ConfigurationError(f"{source.where}: no classes, because {source.why_unlabelled}")
            self._opened[split] = source
        return self._opened[split]

    def _number_classes(self, names: list[str] | None) -> None:
        self.class_names = imagenet_names()[0] if self.classes == "imagenet" else names
        if self.class_names is None:
            if self.num_classes is None and (task := self.trainer and self.trainer.lightning_module):
                taught = getattr(task, "classifier", None) or getattr(task, "network", None)
                self.num_classes = getattr(taught, "num_classes", None)
            if self.num_classes is None:
                raise ConfigurationError(f"{self.source}: its labels are numbers without names; state data.num_classes")
        elif self.num_classes not in (None, len(self.class_names)):
            raise ConfigurationError(
                f"data.num_classes is {self.num_classes}, but there are {len(self.class_names)} named classes; "
                "leave it out, or set data.classes to imagenet where the classifier's classes are those"
            )
        else:
            self.num_classes = len(self.class_names)

    def _labels(self, use: str, names: list[str] | None, reference: list[str] | None) -> list[int] | None:
        """The number of each class of a split; None where labels are right already."""
        if self.classes == "imagenet":
            if names is None:
                raise ConfigurationError(
                    f"{self._where(use)}: data.classes is imagenet, but the labels have no names to order them by. If they are "
                    "in torchvision's order already, set classes to null and num_classes to 1000"
                )
            return imagenet_labels(names, self._where(use))
        if names is None or reference is None:
            return None
        absent = [name for name in reference if name not in names]
        if unknown := [name for name in names if name not in reference]:
            raise ConfigurationError(
                f"{self._where(use)}: its class names do not match those of split {self.splits['train']!r}. Only here: "
                f"{listed(unknown)}. Only there: {listed(absent) or 'none'}"
            )
        if absent:
            count = f"{len(absent)} of the {len(reference)} classes"
            log.warning(f"{self._where(use)} lacks {count} to train on: {listed(absent)}")
        return [reference.index(name) for name in names]

    def _dataset(self, use: str, source: ImageSource, reference: list[str] | None) -> ImageRows | ImageStream:
        train, (rank, world) = use == "train", self.place
        reader = ImageReader(
            mode=_MODES[self.image_shape[0]],
            transform=self.train_transform if train else self.heldout_transform,
            labels=self._labels(use, source.class_names, reference),
            num_classes=self.num_classes,
            shape=self.image_shape,
            seed=self.seed if train else None,
        )
        if not self.streaming:
            return ImageRows(source, reader, 1 if train else self.heldout_draws)
        from datasets.distributed import split_dataset_by_node

        rows = source.stream(_STREAM_SHARDS * world * max(1, self.num_workers))
        rows = split_dataset_by_node(rows, rank, world)
        if not train:
            return ImageStream(source, rows, reader, self.heldout_draws)
        samples = self.samples_per_epoch or source.num_images
        if samples is None:
            raise ConfigurationError(
                f"{self.source} does not state how many images split {self.splits[use]!r} has: set "
                "data.samples_per_epoch"
            )
        order = {"seed": self.seed, "block_size": self.shuffle_buffer, "samples": samples // world}
        return ImageStream(source, rows, reader, **order)

    def _reading(self, use: str) -> dict[str, Any]:
        """Options of the loader of a split."""
        data, workers, (rank, world) = self._data[use], self.num_workers, self.place
        if isinstance(data, ImageStream) and data.rows.num_shards < workers:
            workers = data.rows.num_shards
            log.warning(
                f"split {self.splits[use]!r} has {workers} file(s) for this device, so {workers} worker(s) read it"
            )
        pin = bool(self.trainer) and self.trainer.strategy.root_device.type == "cuda"
        return {"rank": rank, "world_size": world, "num_workers": workers, "pin_memory": pin}

    def train_dataloader(self) -> loading.ResumableLoader:
        return loading.train_loader(self._data["train"], self.batch_size, self.seed, **self._reading("train"))

    def _heldout(self, use: str) -> DataLoader:
        data, reading, order = self._data[use], self._reading(use), None
        if isinstance(data, ImageRows):
            if len(data) < reading["world_size"]:  # a device without a batch leaves the others waiting
                raise ConfigurationError(
                    f"{self._where(use)}: {len(data)} images for {reading['world_size']} devices, and each needs one: set "
                    f"trainer.devices to at most {len(data)}, or name a larger split"
                )
            # Mixed where only some of the batches are used: the first images may all be of the first classes.
            limit = getattr(self.trainer, f"limit_{use}_batches", 1.0)
            order = data.mixed() if isinstance(limit, int) or limit < 1 else None
        return loading.heldout_loader(data, self.batch_size, **reading, order=order)

    def val_dataloader(self) -> DataLoader:
        return self._heldout("val")

    def test_dataloader(self) -> DataLoader:
        return self._heldout("test")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        use = "train" if self.trainer.training else "test" if self.trainer.testing else "val"
        corrupt, data, skipped = self._corrupt[use].take(batch), self._data[use], self._corrupt[use]
        self._seen[use] += len(batch.get("image", ())) + len(corrupt)
        if isinstance(data, ImageRows):
            skipped.count(corrupt, data.source.num_images, data.source)
        else:
            skipped.count(corrupt, max(_ENOUGH_SEEN, min(self._seen[use], self.samples_per_epoch or self._seen[use])))
        if "image" not in batch:
            raise ConfigurationError(f"{self._where(use)}: no image of a batch can be read: {listed(corrupt)}")
        return batch

    def teardown(self, stage: str) -> None:
        for corrupt in self._corrupt.values():
            corrupt.summarize()


class ImageSplit(ImageRows):
    """One split of :class:`ImageData` as a map-style data set, cropped as held-out images, for :class:`DenoiseRequests`.

    Items are ``{"image", "label", "index"}``, or ``{"corrupt": path}`` for an image that cannot be read.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for name in ("cat", "dog"):
        ...     Path("images/train", name).mkdir(parents=True)
        ...     Image.new("RGB", (40, 32)).save(f"images/train/{name}/1.png")
        >>> split = ImageSplit("images", image_size=32)
        >>> [int(item["label"]) for item in split], split[0]["image"].shape
        ([0, 1], torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        source: str,
        image_size: int,
        split: str = "train",
        subset: str | None = None,
        classes: Literal["imagenet"] | None = None,
        num_classes: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        channels: Literal[1, 3] = 3,
    ):
        names = {"subset": subset, "image_column": image_column, "label_column": label_column}
        names |= {"classes": classes, "num_classes": num_classes, "channels": channels}
        data = ImageData(source, image_size, train_split=split, val_split=split, **names)
        data.prepare_data()
        data.setup("validate")
        rows = data._data["val"]
        super().__init__(rows.source, rows.reader)
        self.class_names = data.class_names
