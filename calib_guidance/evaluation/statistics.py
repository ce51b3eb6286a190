"""Statistics of a reference's features, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from calib_guidance import __version__
from calib_guidance.backend.atomic import atomic_write, check_writable
from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import FeatureExtractor
from calib_guidance.metrics.frechet import covariance_root
from calib_guidance.metrics.moments import Moments
from calib_guidance.runs.store import file_sha256, leaves

_SYMMETRY = 1e-4  # of the largest entry: float32 statistics are symmetric to 1e-6
_NOISE = 1e-5  # of the largest eigenvalue, within which one is 0: rounding to float32 moves them by 1e-7
_MOST_IMAGES = 10**12
_TENSORS = {
    "mu": "mean",
    "sigma": "covariance",
    "mu_s": "spatial_mean",
    "sigma_s": "spatial_covariance",
    "features": "features",
    "labels": "labels",
}


@dataclass
class ReferenceStatistics:
    """Mean and covariance of a reference's features, and the features themselves where they were kept.

    Attributes:
        mean, covariance: ``(D,)`` and ``(D, D)`` float64, divisor n − 1.
        spatial_mean, spatial_covariance: those of the spatial features, for sFID; None where there are none.
        features: ``(M, D)`` float32, for precision and recall, density and coverage, KID and classes; None where not kept.
        labels: ``(M,)`` int64 of the features; None where not known.
        num_images: that mean and covariance are of; None where the file does not say.
        provenance: in JSON's types. Of our own: ``features`` (of the extractor), ``images`` (of the image set), ``versions``;
            of any file: ``file``, ``format`` and its ``sha256``.
        images: path of the file, where it also holds images (``arr_0`` of ADM's reference batches).
        image_shape: ``(C, H, W)`` of the images; None where the file does not say.
    """

    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    num_images: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    images: str | None = None
    image_shape: tuple[int, int, int] | None = None
    _roots: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str] | ImageSet | ReferenceStatistics,
        extractor: FeatureExtractor,
        **options: Any,
    ) -> ReferenceStatistics:
        """The statistics of a reference, which is a file of statistics or images.

        Features that are asked for and not in the file are extracted from the images in it, where there are any; mean and
        covariance stay those of the file, which are of more images in ADM's reference batches.

        Args:
            source: a path, or what :func:`open_reference` made of it.
            extractor, options: see :meth:`from_images`.
        """
        opened = source if isinstance(source, ImageSet | ReferenceStatistics) else open_reference(source)
        if isinstance(opened, ImageSet):
            return cls.from_images(opened, extractor, **options)
        opened.check(extractor)
        if options.get("keep_features") and opened.features is None and opened.images is not None:
            batch = cls.from_images(ImageSet(opened.images), extractor, **options | {"spatial": False})
            opened.features, opened.labels = batch.features, batch.labels
            opened.provenance["images"] = batch.provenance["images"]
        return opened

    @classmethod
    def from_images(
        cls,
        images: ImageSet,
        extractor: FeatureExtractor,
        batch_size: int = 64,
        keep_features: bool = False,
        spatial: bool = True,
        processes: DistributedContext | None = None,
    ) -> ReferenceStatistics:
        """Statistics of images, read once, in batches; of sums in float64, the same over any number of processes.

        Args:
            images: at least two of them.
            extractor: of the features; it is put on the device of the process.
            batch_size: images at a time.
            keep_features: keep the features too, 4·D bytes an image, in order of the images.
            spatial: also those of spatial features, where the extractor has any.
            processes: that share the images; None is this one alone.
        """
        processes = processes or DistributedContext()
        extractor.eval().to(processes.device)
        widths = {"pool": extractor.width}
        if spatial and extractor.spatial_width is not None:
            widths["spatial"] = extractor.spatial_width
        moments = {name: Moments(width, processes.device) for name, width in widths.items()}
        kept: list[dict[str, Tensor]] = []
        for batch in images.batches(batch_size, processes.rank, processes.world_size):
            with torch.no_grad():
                found = extractor(batch.image.to(processes.device))
            for name, each in moments.items():
                each.update(getattr(found, name))
            if keep_features:
                kept.append({"index": batch.index, "label": batch.label, "features": found.pool.float()})
        images.gather(processes)
        count = int(processes.sum(moments["pool"].count))
        if count < 2:
            raise ConfigurationError(f"{images.name}: statistics need two images or more, there are {count}")
        statistics = cls(*(value for each in moments.values() for value in each.gather(processes)))
        if keep_features:
            rows = gather_in_order(kept, processes)
            statistics.features = rows["features"]
            statistics.labels = rows["label"] if images.labelled else None
        statistics.num_images, statistics.image_shape = count, images.image_shape
        statistics.provenance = {
            "features": extractor.provenance(),
            "images": images.provenance(),
            "versions": versions(),
        }
        return statistics

    def to(self, device: torch.device) -> ReferenceStatistics:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)

    def moments(self, column: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, covariance and its root of ``features`` or ``spatial`` features; the root is computed once."""
        spatial = column == "spatial"
        covariance = self.spatial_covariance if spatial else self.covariance
        if column not in self._roots:
            self._roots[column] = covariance_root(covariance.cpu()).to(covariance.device)
        return self.spatial_mean if spatial else self.mean, covariance, self._roots[column]

    @staticmethod
    def holds(path: str | os.PathLike[str]) -> bool:
        """Whether a path is a file of statistics, an ``.npz`` with ``mu``, and not one of images alone."""
        path = Path(path).expanduser()
        if path.suffix in (".pkl", ".pt", ".pth"):
            return True  # which read refuses, and says what to do
        if path.suffix != ".npz" or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ReferenceStatistics:
        """Statistics of a file: our own, ADM's reference batches (``mu``, ``sigma``, ``mu_s``, ``sigma_s``, ``arr_0``), or
        ``mu`` and ``sigma`` alone, as EDM, clean-fid, pytorch-fid and torch-fidelity's users write them.

        Nothing pickled in it is executed. Images in it are not read.
        """
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise ConfigurationError(
                f"{path}: statistics are read of .npz files with mu and sigma. What is pickled (.pkl of EDM2, .pt) is not "
                "loaded: save mu and sigma of it with numpy.savez, or make them with calib-guidance reference"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                if missing := {"mu", "sigma"} - names:
                    raise ConfigurationError(
                        f"{path} has no {' and no '.join(sorted(missing))}, it has: {', '.join(sorted(names)) or 'nothing'}. "
                        "Statistics are mu (D,) and sigma (D, D); calib-guidance reference makes them of images"
                    )
                arrays = {name: file[name] for name in (*_TENSORS, "num_images", "provenance") if name in names}
        except FileNotFoundError as error:
            raise ConfigurationError(f"there is no file {path}") from error
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, ConfigurationError):
                raise
            why = "it holds pickled objects, which are not loaded" if "allow_pickle" in str(error) else error
            raise ConfigurationError(f"{path} cannot be read: {why}") from error
        try:
            moments, rank = _read_moments(arrays, "mu", "sigma")
            spatial = _read_moments(arrays, "mu_s", "sigma_s")[0] if {"mu_s", "sigma_s"} & names else ()
            statistics = cls(*moments, *spatial)
            statistics._take_own(arrays, rank)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{path}: {error}") from error
        if "arr_0" in names:
            statistics.images, statistics.image_shape = str(path), ImageSet(path).image_shape
        statistics.provenance |= {
            "file": str(path),
            "format": "calib-guidance" if "provenance" in arrays else f"{', '.join(sorted(names))} in .npz",
            "sha256": file_sha256(path),
        }
        return statistics

    def _take_own(self, arrays: Mapping[str, np.ndarray], rank: int) -> None:
        """What our own files have besides; ValueError where that cannot be."""
        if "provenance" in arrays:
            try:
                self.provenance = json.loads(str(arrays["provenance"]))
                self.image_shape = tuple(self.provenance["images"]["image_shape"])
                dict(self.provenance["features"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"provenance cannot be read: {error}") from error
        if "num_images" in arrays:
            count = arrays["num_images"]
            if count.shape or count.dtype.kind not in "iu" or not max(2, rank + 1) <= int(count) <= _MOST_IMAGES:
                raise ValueError(f"num_images is {count}; a covariance of rank {rank} needs {rank + 1} images or more")
            self.num_images = int(count)
        if "features" in arrays:
            features, labels = arrays["features"], arrays.get("labels")
            rows, width = features.shape if features.ndim == 2 else (-1, -1)
            if width != len(self.mean) or (labels is not None and labels.shape != (rows,)):
                raise ValueError(f"features {features.shape} and their labels do not fit mu of width {len(self.mean)}")
            if self.num_images not in (None, rows):
                raise ValueError(f"num_images is {self.num_images}, and there are features of {rows} images")
            if features.dtype.kind != "f" or not np.isfinite(features).all():
                raise ValueError("features must be finite floats")
            if labels is not None and (labels.dtype.kind not in "iu" or labels.min(initial=0) < -1):
                raise ValueError("labels must be integers of at least 0, or -1 where one is not known")
            self.features = torch.from_numpy(features.astype(np.float32))
            self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write an ``.npz`` atomically; an existing file is not overwritten.

        ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` as others read them; ``features``, ``labels``, ``num_images``, and ``provenance``
        as JSON text. The same statistics make the same bytes.

        Returns:
            SHA-256 of the file.
        """
        path = Path(path).expanduser()
        check_output(path)
        tensors = {name: getattr(self, attribute) for name, attribute in _TENSORS.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        if self.num_images is not None:
            arrays["num_images"] = np.array(self.num_images)
        arrays["provenance"] = np.array(json.dumps(self.provenance, ensure_ascii=False))
        try:
            with atomic_write(path) as file:
                np.savez(file, **arrays)
                check_output(path)  # made by another meanwhile
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error
        return file_sha256(path)

    def check(self, extractor: FeatureExtractor) -> None:
        """Refuse to be compared with features of another kind.

        Widths are compared, and, where the file says what its features are of, all that the extractor says of itself (weights'
        hash, resize, normalization …) but versions of libraries and where the weights lie.
        """
        pairs = [("features", len(self.mean), extractor.width)]
        if self.spatial_mean is not None and extractor.spatial_width is not None:
            pairs.append(("spatial features", len(self.spatial_mean), extractor.spatial_width))
        for name, saved, now in pairs:
            if saved != now:
                raise ConfigurationError(
                    f"{self.name} has statistics of {saved} {name}, {extractor.name} gives {now}: take the extractor that the "
                    "statistics were made with (--features), or make new ones with calib-guidance reference"
                )
        if "features" in self.provenance:
            said = self.provenance["features"], json.loads(json.dumps(extractor.provenance()))
            saved, now = (dict(leaves(each)) for each in said)
            different = [
                f"{key}: {saved.get(key)} in the reference, {now.get(key)} now"
                for key in sorted((saved.keys() | now.keys()) - {"weights"})  # their hash counts, not where they lie
                if _unversioned(saved.get(key)) != _unversioned(now.get(key))
            ]
            if different:
                listed = "".join(f"\n  {line}" for line in different)
                raise ConfigurationError(
                    f"{self.name} has statistics of other features than {extractor.name}:{listed}\ntake the extractor that "
                    "they were made with (--features), or make new ones with calib-guidance reference"
                )

    @property
    def name(self) -> str:
        return self.provenance.get("file", "the reference")

    @property
    def notes(self) -> list[str]:
        """What a reader of the metrics should know of the reference, a sentence each."""
        notes = []
        if "features" not in self.provenance:
            notes.append("the reference's file does not say which features, resize and images its statistics are of")
        if self.features is not None and self.num_images is None:
            notes.append(
                f"mean and covariance are those of the reference's file, features those of the {len(self.features)} images in it"
            )
        return notes


def _read_moments(arrays: Mapping[str, np.ndarray], mu: str, sigma: str) -> tuple[tuple[Tensor, Tensor], int]:
    """Mean and covariance of a file, in float64, and the rank of the covariance; ValueError where they are none."""
    if missing := {mu, sigma} - arrays.keys():
        raise ValueError(f"it has one of {mu} and {sigma}, and no {missing.pop()}")
    mean, covariance = arrays[mu], arrays[sigma]
    if (
        mean.ndim != 1
        or not len(mean)
        or covariance.shape != (len(mean), len(mean))
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
    ):
        shapes = f"{mu} is {mean.dtype} {mean.shape}, {sigma} {covariance.dtype} {covariance.shape}"
        raise ValueError(f"{shapes}: (D,) and (D, D) of floats belong together")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mu} or {sigma} is not finite everywhere")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance))
    if (covariance - covariance.T).abs().max() > _SYMMETRY * covariance.abs().max():
        raise ValueError(f"{sigma} is not a covariance: not symmetric")
    covariance = (covariance + covariance.T) / 2
    values = torch.linalg.eigvalsh(covariance)
    if values[0] < -_NOISE * values.abs().max():
        raise ValueError(
            f"{sigma} is not a covariance: eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, none may be below 0"
        )
    return (mean, covariance), int((values > _NOISE * values[-1]).sum())


def open_reference(source: str | os.PathLike[str], **options: Any) -> ReferenceStatistics | ImageSet:
    """A reference by its path: a file of statistics, or images with ``options`` of ``ImageSet``."""
    return ReferenceStatistics.read(source) if ReferenceStatistics.holds(source) else ImageSet(source, **options)


def gather_in_order(batches: list[dict[str, Tensor]], processes: DistributedContext) -> dict[str, Tensor]:
    """Rows ``(n, …)`` by name of the batches of all processes, on the CPU, in order of the rows ``index``."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]} if batches else {}
    kinds = processes.gather({name: (value.shape[1:], value.dtype) for name, value in rows.items()})
    for name, (shape, dtype) in next(filter(None, kinds)).items():  # a process without batches takes part too
        rows[name] = processes.gather_rows(rows.get(name, torch.zeros(0, *shape, dtype=dtype)))
    order = rows["index"].argsort(stable=True)
    return {name: value[order] for name, value in rows.items()}


def versions() -> dict[str, str]:
    """Of what values and statistics depend on."""
    libraries = {"torch": torch, "numpy": np, "Pillow": PIL}
    return {"calib_guidance": __version__} | {name: library.__version__ for name, library in libraries.items()}


def _unversioned(value: object) -> object:
    """``torch 2.11.0`` as ``torch``."""
    return re.sub(r" \d+\.\d[\w.]*", "", value) if isinstance(value, str) else value


def check_output(path: Path) -> None:
    """Refuse to write statistics there, before they are made. Nothing is left there."""
    if path.suffix != ".npz":
        raise ConfigurationError(f"--output {path}: statistics are written as .npz")
    if path.exists():
        raise ConfigurationError(f"{path} exists already: remove it, or name another --output")
    check_writable(path.parent, "--output")
