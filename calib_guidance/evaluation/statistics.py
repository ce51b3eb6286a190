"""Statistics of a reference's features, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
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
from calib_guidance.backend.shipped import find_file
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import FeatureExtractor
from calib_guidance.metrics.frechet import covariance_root
from calib_guidance.metrics.moments import Moments
from calib_guidance.runs.identity import leaves
from calib_guidance.runs.integrity import file_sha256
from calib_guidance.weights.pickles import read_edm2_statistics

_SYMMETRY = 1e-4  # of the largest entry: float32 statistics are symmetric to 1e-6
_NOISE = 1e-5  # of the largest eigenvalue, within which one is 0: rounding to float32 moves them by 1e-7
_MOST_IMAGES = 10**12
_TENSORS = {"mu": "mean", "sigma": "covariance", "mu_s": "spatial_mean", "sigma_s": "spatial_covariance"}
_TENSORS |= {"features": "features", "labels": "labels"}


@dataclass
class ReferenceStatistics:
    """Mean and covariance of a reference's features, and the features themselves where they were kept."""

    mean: Tensor | None  # (D,) float64; None until images are measured
    covariance: Tensor | None  # (D, D) float64, divisor n − 1
    spatial_mean: Tensor | None = None  # of the spatial features, for sFID
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None  # (M, D) float32, for precision and recall, density and coverage, KID and classes
    labels: Tensor | None = None  # (M,) int64 of the features
    num_images: int | None = None  # that mean and covariance are of; None where a file does not say
    # In JSON's types: features (of the extractor), images (of the image set), versions; of a file also file, format, sha256.
    provenance: dict[str, Any] = field(default_factory=dict)
    images: ImageSet | None = None  # that it is made of, or that a file also holds (arr_0 of ADM's reference batches)
    image_shape: tuple[int, int, int] | None = None  # (C, H, W); None where a file does not say
    # Of a file with statistics of several extractors, EDM2's: mean and covariance by FeatureExtractor.kind.
    by_kind: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _roots: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, source: str | os.PathLike[str] | ImageSet, **options: Any) -> ReferenceStatistics:
        """A reference by its path: a file of statistics, or images with ``options`` of ``ImageSet``."""
        if not isinstance(source, ImageSet) and cls.holds(source):
            return cls.read(find_file(source))
        images = source if isinstance(source, ImageSet) else ImageSet(source, **options)
        return cls(None, None, num_images=images.num_images, images=images, image_shape=images.image_shape)

    def measured(
        self,
        extractor: FeatureExtractor,
        batch_size: int = 64,
        keep_features: bool = False,
        spatial: bool = True,
        processes: DistributedContext | None = None,
    ) -> ReferenceStatistics:
        """Complete: with the statistics of images, read once, of sums in float64, the same over any number of processes.

        Mean and covariance of a file stay, which are of more images than the file holds in ADM's reference batches. The extractor
        is put on the device of the process. ``keep_features`` are 4·D bytes an image, in order of the images. ``spatial`` ones
        have statistics where the extractor has any. ``processes`` share the images; None is this one alone.
        """
        images, processes, widths = self.images, processes or DistributedContext(), {}
        if self.mean is None:
            widths = {"pool": extractor.width, "spatial": extractor.spatial_width if spatial else None}
        else:
            self.check(extractor)
            if not keep_features or self.features is not None or images is None:
                return self
        extractor.eval().to(processes.device)
        moments = {name: Moments(width, processes.device) for name, width in widths.items() if width is not None}
        kept: list[dict[str, Tensor]] = []
        for batch in images.batches(batch_size, processes.rank, processes.world_size):
            with torch.no_grad():
                found = extractor(batch.image.to(processes.device))
            for name, each in moments.items():
                each.update(getattr(found, name))
            if keep_features:
                kept.append({"index": batch.index, "label": batch.label, "features": found.pool.float()})
        images.gather(processes)
        if moments:
            self.num_images = int(processes.sum(moments["pool"].count))
            if self.num_images < 2:
                raise ConfigurationError(
                    f"{self.name}: statistics need two images or more, there are {self.num_images}"
                )
            self.mean, self.covariance = moments["pool"].gather(processes)
            if "spatial" in moments:
                self.spatial_mean, self.spatial_covariance = moments["spatial"].gather(processes)
            self.provenance |= {"features": extractor.provenance(), "images": None, "versions": versions()}
        self.provenance["images"] = images.provenance()
        if keep_features:
            rows = gather_in_order(kept, processes)
            self.features, self.labels = rows["features"], rows["label"] if images.labelled else None
        return self

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
        """Whether a path is a file of statistics, and not one of images alone."""
        path = find_file(Path(path).expanduser())  # one that comes with the package is found from any folder
        if path.suffix in (".pkl", ".pt", ".pth"):
            return True  # EDM2's; what else there is read refuses, and says what to do
        if path.suffix != ".npz" or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ReferenceStatistics:
        """Statistics of a file: our own, ADM's reference batches (``mu``, ``sigma``, ``mu_s``, ``sigma_s``, ``arr_0``), EDM2's
        ``.pkl``, or ``mu`` and ``sigma`` alone (EDM, clean-fid, pytorch-fid). Nothing pickled in it is executed.
        """
        path = Path(path).expanduser()
        if path.suffix == ".pkl":
            return cls._of_edm2(path)
        if path.suffix != ".npz":
            raise ConfigurationError(
                f"{path}: statistics are read of .npz files with mu and sigma, and of EDM2's .pkl. A .pt is not loaded: save mu "
                "and sigma of it with numpy.savez, or make them with calib-guidance reference"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                arrays = {name: file[name] for name in (*_TENSORS, "num_images", "provenance") if name in names}
        except FileNotFoundError as error:
            raise ConfigurationError(f"there is no file {path}") from error
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            why = "it holds pickled objects, which are not loaded" if "allow_pickle" in str(error) else error
            raise ConfigurationError(f"{path} cannot be read: {why}") from error
        if missing := {"mu", "sigma"} - names:
            raise ConfigurationError(
                f"{path} has no {' and no '.join(sorted(missing))}, it has: {', '.join(sorted(names)) or 'nothing'}. "
                "Statistics are mu (D,) and sigma (D, D); calib-guidance reference makes them of images"
            )
        try:
            moments, rank = _read_moments(arrays, "mu", "sigma")
            spatial = _read_moments(arrays, "mu_s", "sigma_s")[0] if {"mu_s", "sigma_s"} & names else ()
            statistics = cls(*moments, *spatial)
            statistics._take_own(arrays, rank)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{path}: {error}") from error
        if "arr_0" in names:
            statistics.images = ImageSet(path)
            statistics.image_shape = statistics.images.image_shape
        statistics.provenance |= {
            "file": str(path),
            "format": "calib-guidance" if "provenance" in arrays else f"{', '.join(sorted(names))} in .npz",
            "sha256": file_sha256(path),
        }
        return statistics

    @classmethod
    def _of_edm2(cls, path: Path) -> ReferenceStatistics:
        try:
            with open(path, "rb") as file:
                found = read_edm2_statistics(file)
            count = found.pop("num_images", {}).get("num_images")
            names = {"fid": "inception", "fd_dinov2": "dinov2"}
            kinds = {names[metric]: _read_moments(moments, "mu", "sigma")[0] for metric, moments in found.items()}
        except FileNotFoundError as error:
            raise ConfigurationError(f"there is no file {path}") from error
        except (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        first = kinds.get("inception") or kinds["dinov2"]
        statistics = cls(*first, num_images=None if count is None else int(count), by_kind=kinds)
        words = f"EDM2's statistics of {' and '.join(sorted(kinds))} features"
        statistics.provenance |= {"file": str(path), "format": words, "sha256": file_sha256(path)}
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
        """Write an ``.npz`` atomically, never over an existing file, and return its SHA-256, which the statistics determine."""
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
        """Refuse to be compared with features of another kind: of another width or, where the file says what its features are
        of, of another provenance but for versions of libraries and where the weights lie.
        """
        if extractor.kind in self.by_kind:
            self.mean, self.covariance = self.by_kind[extractor.kind]
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
            listed = "".join(
                f"\n  {key}: {saved.get(key)} in the reference, {now.get(key)} now"
                for key in sorted((saved.keys() | now.keys()) - {"weights"})  # their hash counts, not where they lie
                if _unversioned(saved.get(key)) != _unversioned(now.get(key))
            )
            if listed:
                raise ConfigurationError(
                    f"{self.name} has statistics of other features than {extractor.name}:{listed}\ntake the extractor that "
                    "they were made with (--features), or make new ones with calib-guidance reference"
                )

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse samples ``(C, H, W)`` of another size or mode than the reference's images, where those are known."""
        if self.image_shape is None or tuple(self.image_shape) == tuple(shape):
            return
        words = [f"{'×'.join(map(str, s))} {'gray' if c == 1 else 'RGB'}" for c, *s in (shape, self.image_shape)]
        resize = tuple(shape[1:]) != tuple(self.image_shape[1:])
        cure = "--size N resizes and crops both" if resize else "--mode RGB or --mode L makes both alike"
        raise ConfigurationError(
            f"{name} has images {words[0]}, the reference {self.name} {words[1]}: they cannot be compared. Take a reference "
            f"like the samples; in evaluate {cure}, where they are images"
        )

    @property
    def name(self) -> str:
        return self.provenance.get("file") or (self.images.name if self.images else "the reference")

    @property
    def num_features(self) -> int | None:
        """Images whose features are kept or can be extracted; None where none are."""
        if self.features is not None:
            return len(self.features)
        return self.images and self.images.num_images

    @property
    def has_spatial(self) -> bool:
        """Whether there are statistics of spatial features, or will be."""
        return self.mean is None or self.spatial_mean is not None

    @property
    def labelled(self) -> bool:
        """Whether the classes of the images are known whose features are kept or can be extracted."""
        return self.labels is not None or bool(self.features is None and self.images and self.images.labelled)

    @property
    def notes(self) -> list[str]:
        """What the metrics depend on, a sentence each."""
        notes = []
        if "features" not in self.provenance:
            notes.append("the reference's file does not say which features, resize and images its statistics are of")
        if self.features is not None and self.num_images is None:
            features = f"features those of the {len(self.features)} images in it"
            notes.append(f"mean and covariance are those of the reference's file, {features}")
        return notes


def _read_moments(arrays: Mapping[str, np.ndarray], mu: str, sigma: str) -> tuple[tuple[Tensor, Tensor], int]:
    """Mean and covariance of a file, in float64, and the rank of the covariance; ValueError where they are none."""
    if missing := {mu, sigma} - arrays.keys():
        raise ValueError(f"it has one of {mu} and {sigma}, and no {missing.pop()}")
    mean, covariance = arrays[mu], arrays[sigma]
    floats = {mean.dtype.kind, covariance.dtype.kind} == {"f"}
    if not floats or mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
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
        found = f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, none may be below 0"
        raise ValueError(f"{sigma} is not a covariance: {found}")
    return (mean, covariance), int((values > _NOISE * values[-1]).sum())


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
