"""Images in ``.npz`` files."""

from __future__ import annotations

import contextlib
import logging
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calib_guidance.data.base import ImageSource, Row
from calib_guidance.errors import ConfigurationError, first_line

log = logging.getLogger(__name__)

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzImages(ImageSource):
    """``arr_0``, uint8 ``(N, H, W, C)``, and, where it is there, ``arr_1`` ``(N,)``, their classes: what ADM's sampling writes.

    Read from beginning to end, a block at a time, compressed or not; checksums are compared.
    """

    kind = "npz"

    def __init__(self, name: str):
        self.path, self.labels = Path(name).expanduser(), None
        with self._array("arr_0") as (file, self.shape, dtype, fortran, size):
            self._check_images(dtype, fortran)
            if size != math.prod(self.shape):
                raise ConfigurationError(
                    f"{self.path}: arr_0 says it holds {math.prod(self.shape)} bytes, and holds {size}. Write it with numpy.savez"
                )
        with self._array("arr_1", optional=True) as (file, shape, dtype, *_):
            if file and (shape != self.shape[:1] or dtype.kind not in "iu"):
                message = f"arr_1 is {dtype} {shape}, no class for each of {self.shape[0]} images: not used"
                log.warning(f"{self.path}: {message}")
            elif file:  # classes (N,)
                self.labels = np.frombuffer(self._exactly(file, dtype.itemsize * shape[0]), dtype).astype(np.int64)
        self.labelled = self.labels is not None
        super().__init__(name, self.shape[0])

    @contextlib.contextmanager
    def _array(self, name: str, optional: bool = False) -> Iterator[tuple[Any, ...]]:
        """An array's bytes, its shape and type, whether it is in Fortran order, and the number of bytes that are there."""
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:
            if f"{name}.npy" not in archive.namelist():
                if optional:
                    yield (None,) * 5
                    return
                there = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise ConfigurationError(
                    f"{self.path} has no {name}, it has: {there}. Images are arr_0, uint8 (N, H, W, C), as "
                    "numpy.savez(file, images, labels) names them"
                )
            try:
                with archive.open(f"{name}.npy") as file:
                    header = self._header(file)
                    yield file, *header, archive.getinfo(file.name).file_size - file.tell()
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
                raise ConfigurationError(f"{self.path} is damaged: {error}. Copy or download it again") from error

    def _header(self, file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], np.dtype, bool]:
        try:
            shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            if any(size < 0 for size in shape) or 0 in shape[1:]:
                raise ValueError(f"its shape is {shape}")
        except (zipfile.BadZipFile, zlib.error):
            raise
        except Exception as error:  # numpy has the header parsed as Python, which fails in many ways
            raise ConfigurationError(
                f"{self.path}: {file.name} is not a numpy array: {first_line(error)}. Write it with numpy.savez"
            ) from error
        return shape, dtype, fortran

    def _check_images(self, dtype: np.dtype, fortran: bool) -> None:
        shape = self.shape
        if dtype != np.uint8:
            cure = {
                "O": "pickled objects are not loaded",
                "f": "convert it to 8 bits by the rule of its model, such as (x + 1)·127.5 clipped for [−1, 1] (ADM)",
            }.get(dtype.kind, "convert it")
        elif len(shape) == 3:
            cure = "add the channel: images[..., None]"
        elif len(shape) != 4 or shape[3] not in (1, 3, 4):
            cure = "transpose it: images.transpose(0, 2, 3, 1)" if shape[1:2] in ((1,), (3,)) else "reshape it"
        elif fortran:
            cure = "of Fortran order images cannot be read one by one: save numpy.ascontiguousarray(images)"
        else:
            return
        raise ConfigurationError(
            f"{self.path}: arr_0 is {dtype} {shape}, images are uint8 (N, H, W, C) with C = 1 or 3: {cure}"
        )

    def _exactly(self, file: zipfile.ZipExtFile, count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise EOFError(f"{file.name} ends {count - len(data)} bytes too early")
        return data

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        height, width, channels = self.shape[1:]
        length, place = height * width * channels, 0
        with self._array("arr_0") as (file, *_):
            for block in blocks:
                for _ in range(place, block.start):  # read too: the checksum covers it
                    self._exactly(file, length)
                data = np.frombuffer(self._exactly(file, length * len(block)), np.uint8)
                place = block.stop
                yield [
                    Row(f"image {i}", pixels, -1 if self.labels is None else int(self.labels[i]))
                    for i, pixels in zip(block, data.reshape(-1, height, width, channels), strict=True)
                ]
