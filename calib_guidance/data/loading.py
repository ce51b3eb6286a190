"""Loaders for ``fit``: training batches from which a killed run resumes, held-out batches that hold each sample once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.data.base import ImageSource, listed
from calib_guidance.data.preprocess import corrupt_images
from calib_guidance.errors import ConfigurationError

log = logging.getLogger(__name__)


class DataModule(L.LightningDataModule):
    """Data module that allows more devices than samples: some then get none. ``place`` is rank and number of devices."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def check_at_least(least: int, **values: int | None) -> None:
    """Raise ConfigurationError for the first option of the data module that is below ``least``; None is unset."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigurationError(f"data.{name} must be at least {least}, got {value}")


def hashed(*key: int) -> int:
    """A 63-bit number that is a function of ``key`` (integers ≥ 0) and looks random."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def run_seed(seed: int | None) -> int:
    """The seed that a data module was given, or that of ``seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Start torch's global CPU generator, which torchvision's v2 transforms use, at a function of ``key``; restore it after."""
    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reset the generators of the GPUs as well
        torch.default_generator.manual_seed(hashed(*key))
        yield


_REPORTS = ("corrupt", "note", "wrong")


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of items; numbers become int64.

    Items may report ``corrupt`` images, a ``note``, what is ``wrong``, as lists of messages; one without ``index`` only does.
    """
    reports = {key: [text for item in items for text in item.get(key, ())] for key in _REPORTS}
    good = [{key: value for key, value in item.items() if key not in _REPORTS} for item in items if "index" in item]
    return (default_collate(good) if good else {}) | {key: texts for key, texts in reports.items() if texts}


def take_reports(batch: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Take names of corrupt images and notes out of a batch; raise what is wrong: a worker would make it a traceback."""
    corrupt, notes, wrong = (batch.pop(key, []) for key in _REPORTS)
    if wrong:
        raise ConfigurationError(wrong[0])
    return corrupt, notes


class SkippedImages:
    """The distinct corrupt images found so far among those of ``where``; ``setting`` is the option that limits their fraction."""

    def __init__(self, where: str, max_fraction: float, setting: str = "data.max_corrupt"):
        if not 0 <= max_fraction <= 1:
            raise ConfigurationError(f"{setting} must be in [0, 1], got {max_fraction}")
        self.where, self.max_fraction, self.setting = where, max_fraction, setting
        self.names: set[str] = set()
        self._notes: set[str] = set()

    def count(self, names: Iterable[str], total: int, source: ImageSource | None = None) -> None:
        """Warn of each new name; if too many of ``total`` are corrupt, read all of ``source`` and raise with all of them."""
        _warn(names, self.names, "skipped a corrupt image: ")
        if len(self.names) <= self.max_fraction * total:
            return
        if source is not None:
            log.warning(f"{self.where}: too many corrupt images; reading all {total:,} to name every corrupt one")
            _warn(corrupt_images(source), self.names, "skipped a corrupt image: ")
        raise ConfigurationError(
            f"{self.where}: {len(self.names)} of {total} images are corrupt, more than {self.setting} "
            f"({self.max_fraction:g}) allows: {listed(sorted(self.names))}. Repair or remove them, or raise {self.setting}"
        )

    def take(self, batch: dict[str, Any]) -> list[str]:
        """Take the reports out of a batch, log its notes, and return the names of corrupt images."""
        corrupt, notes = take_reports(batch)
        _warn(notes, self._notes)
        return corrupt

    def summarize(self) -> None:
        if self.names:
            log.warning(f"{self.where}: {len(self.names)} corrupt images were skipped: {listed(sorted(self.names))}")


def _warn(texts: Iterable[str], known: set[str], start: str = "") -> None:
    for text in texts:
        if text not in known:
            known.add(text)
            log.warning(start + text)


def _world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class ResumableLoader(StatefulDataLoader):
    """A loader whose place in the epoch is part of every checkpoint that Lightning writes.

    The state holds the place of every device, as each reads its own samples. It is used only in the epoch that it comes from:
    Lightning tells the epoch to the sampler before it asks for a batch, and the iterator is made at that moment, so workers never
    read ahead in the order of another epoch.

    Examples:
        >>> loader = ResumableLoader(list(range(6)), batch_size=2)
        >>> batches = iter(loader)
        >>> next(batches)
        tensor([0, 1])
        >>> later = ResumableLoader(list(range(6)), batch_size=2)
        >>> later.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in later]
        [[2, 3], [4, 5]]
    """

    _pending: dict[str, Any] | None = None  # where to resume, until iteration starts
    # Epoch, number of batches taken in it and, when iteration ends, torchdata's state.
    _place: dict[str, Any] | None = None

    @property
    def _order(self) -> Any:
        return self.dataset if isinstance(self.dataset, IterableDataset) else self.sampler

    def _layout(self) -> dict[str, int | None]:
        sizes = {"devices": _world()[1], "batch_size": self.batch_size, "num_workers": self.num_workers}
        return sizes | {"batches per epoch": len(self), "seed": getattr(self._order, "seed", None)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pending, self._pending = self._pending, None
        done, epoch = 0, getattr(self._order, "epoch", 0)
        if pending is not None and pending["epoch"] == epoch:
            super().load_state_dict(pending["loader"])
            done = pending["batches"]
        try:
            # A stream has no end of its own: the numbers, first in the pair, end it before it is asked for one more.
            for batches, batch in zip(range(done + 1, len(self) + 1), super().__iter__(), strict=False):
                self._place = {"epoch": epoch, "batches": batches}
                yield batch
                done = batches
            if done < len(self):
                raise ConfigurationError(f"the training data ended after {done} of the {len(self)} batches of an epoch")
        finally:
            # Lightning drops the iterator at the end of fit; the state is still asked for after that.
            if self._place is not None and "loader" not in self._place:
                self._place["loader"] = super().state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The places of all devices, which all have to call it."""
        place = self._pending or self._place
        if place is not None and "loader" not in place:
            place = {**place, "loader": super().state_dict()}
        return {"layout": self._layout(), "places": DistributedContext(*_world()).gather(place)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from there when iteration starts in the epoch that the state comes from."""
        then, now, places = state_dict["layout"], self._layout(), state_dict["places"]
        in_mid_epoch = any(place is not None and place["batches"] < then["batches per epoch"] for place in places)
        different = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
        if in_mid_epoch and different:
            raise ConfigurationError(
                "the checkpoint was written in the middle of an epoch, which resumes only with the same layout: "
                f"{'; '.join(different)}. Resume with the former, or with --ckpt_path from a checkpoint that was written at the "
                f"end of an epoch: {' or '.join(state_dict.get('at_epoch_end', list)()) or 'there is none in its folder'}"
            )
        self._pending = places[_world()[0]] if in_mid_epoch else None


class _Shuffled(StatefulDistributedSampler):
    """Equal parts of a shuffled data set, which is told the epoch too, for what it draws itself."""

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def train_loader(
    dataset: Dataset, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, **options: Any
) -> ResumableLoader:
    """Batches of one device for training: shuffled by (seed, epoch) alone, all of the same size, as many on every device.

    Args:
        dataset: items as :func:`collate` takes them. Map-style; or an IterableDataset that is one device's share, shuffles
            itself, has ``__len__`` (samples of an epoch on one device), ``epoch``, ``seed``, ``set_epoch``, ``state_dict`` and
            ``load_state_dict``, and yields at least that many samples.
        batch_size: samples per batch and device.
        seed: of the order of map-style data.
        options: ``num_workers``, ``pin_memory`` of torch's DataLoader. Workers restart in every epoch, to be told it.
    """
    streamed = isinstance(dataset, IterableDataset)
    sampler = None if streamed else _Shuffled(dataset, world_size, rank, seed=seed, drop_last=True)
    # By keyword: Lightning's overfit_batches rebuilds the loader from the arguments it was made with. The seed of workers comes
    # from the generator, not out of the run's.
    options |= {"batch_size": batch_size, "collate_fn": collate, "generator": torch.Generator()}
    loader = ResumableLoader(dataset, sampler=sampler, drop_last=True, **options)
    if streamed:
        loader.sampler.set_epoch = dataset.set_epoch  # Lightning tells the epoch to samplers only
    if len(loader) == 0:
        found = len(dataset) * (world_size if streamed else 1)
        raise ConfigurationError(
            f"batch_size {batch_size} on {world_size} device(s) needs at least {batch_size * world_size} training images, "
            f"found {found}; choose a smaller batch_size"
        )
    return loader


class _HeldoutLoader(DataLoader):
    """A loader that passes over batches without a readable image; the batch before one has its reports."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        current: dict[str, Any] = {}
        for batch in super().__iter__():
            if "index" in batch and "index" in current:
                yield current
                current = {}
            reports = {key: current.get(key, []) + batch.get(key, []) for key in _REPORTS}
            current |= batch | {key: texts for key, texts in reports.items() if texts}
        if "index" not in current and current:
            corrupt, _ = take_reports(current)
            raise ConfigurationError(f"no image can be read: {listed(corrupt)}")
        if current:
            yield current


def heldout_loader(
    dataset: Dataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    order: Sequence[int] | None = None,
    **options: Any,
) -> DataLoader:
    """Batches of one device for evaluation: over all devices every sample exactly once.

    Devices may differ by a sample, and have none where there are fewer samples than devices; the last batch may be smaller.
    Arguments are as of :func:`train_loader`; ``order`` is that of the samples of map-style data, None keeps theirs.
    """
    sampler = None
    if not isinstance(dataset, IterableDataset):
        dataset = Subset(dataset, (range(len(dataset)) if order is None else order)[rank::world_size])
        sampler = DistributedSampler(dataset, 1, 0, shuffle=False)  # Lightning replaces samplers of other kinds
    options |= {"batch_size": batch_size, "collate_fn": collate, "generator": torch.Generator()}
    return _HeldoutLoader(dataset, sampler=sampler, **options)
