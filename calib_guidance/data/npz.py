"""Images in ``.npz`` files."""

from __future__ import annotations

import io
import logging
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from calib_guidance.data.base import ImageSource, Row
from calib_guidance.errors import ConfigurationError

log = logging.getLogger(__name__)


class NpzImages(ImageSource):
    """``arr_0``, uint8 ``(N, H, W, C)``, and, where it is there, ``arr_1`` ``(N,)``, their classes: what ADM's sampling writes.

    Read from beginning to end, a block at a time, compressed or not; checksums are compared.
    """

    kind = "npz"

    def __init__(self, name: str):
        self.path = Path(name).expanduser()
        with self._member("arr_0.npy") as file:
            self.shape, dtype, fortran = self._header(file)
        self._check(dtype, fortran)
        self.labels = self._labels()
        self.labelled = self.labels is not None
        super().__init__(name, self.shape[0])

    def _member(self, member: str) -> zipfile.ZipExtFile:
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:  # an open member keeps the file open
            if member not in archive.namelist():
                there = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise ConfigurationError(
                    f"{self.path} has no {member.removesuffix('.npy')}, it has: {there}. Images are arr_0, uint8 (N, H, W, C), "
                    "as numpy.savez(file, images, labels) names them"
                )
            return archive.open(member)

    def _header(self, file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype, bool]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigurationError(f"{self.path}: {file.name} is not a numpy array: {error}") from error
        return shape, dtype, fortran

    def _check(self, dtype: np.dtype, fortran: bool) -> None:
        where, shape = f"{self.path}: arr_0 is {dtype} {self.shape}", self.shape
        needed = "images are uint8 (N, H, W, C) with C = 1 or 3"
        if dtype != np.uint8:
            cure = {
                "O": "pickled objects are not loaded",
                "f": "convert it to 8 bits by the rule of its model, such as (x + 1)·127.5 clipped for [−1, 1] (ADM)",
            }.get(dtype.kind, "convert it")
            raise ConfigurationError(f"{where}, {needed}: {cure}")
        if len(shape) != 4 or shape[3] not in (1, 3, 4):
            cure = "add the channel: images[..., None]" if len(shape) == 3 else "reshape it"
            if len(shape) == 4 and shape[1] in (1, 3):
                cure = "transpose it: images.transpose(0, 2, 3, 1)"
            raise ConfigurationError(f"{where}, {needed}: {cure}")
        if fortran:
            raise ConfigurationError(
                f"{where} in Fortran order, where images cannot be read one by one: save numpy.ascontiguousarray(images)"
            )

    def _labels(self) -> np.ndarray | None:
        """Classes ``(N,)`` int64, where ``arr_1`` is one integer for each image."""
        if "arr_1.npy" not in zipfile.ZipFile(self.path).namelist():
            return None
        with self._member("arr_1.npy") as file:
            shape, dtype, _ = self._header(file)
            if shape != self.shape[:1] or dtype.kind not in "iu":
                message = f"arr_1 is {dtype} {shape}, no class for each of {self.shape[0]} images: not used"
                log.warning(f"{self.path}: {message}")
                return None
            return np.frombuffer(self._exactly(file, dtype.itemsize * shape[0]), dtype).astype(np.int64)

    def _exactly(self, file: zipfile.ZipExtFile, count: int) -> bytes:
        try:
            data = file.read(count)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ConfigurationError(f"{self.path} is damaged: {error}") from error
        if len(data) < count:
            raise ConfigurationError(f"{self.path} is damaged: {file.name} ends {count - len(data)} bytes too early")
        return data

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        height, width, channels = self.shape[1:]
        length, place = height * width * channels, 0
        with self._member("arr_0.npy") as file:
            self._header(file)
            for block in blocks:
                for _ in range(place, block.start):  # read too: the checksum covers it
                    self._exactly(file, length)
                data = np.frombuffer(self._exactly(file, length * len(block)), np.uint8)
                place = block.stop
                yield [
                    Row(f"image {i}", pixels, -1 if self.labels is None else int(self.labels[i]))
                    for i, pixels in zip(block, data.reshape(-1, height, width, channels), strict=True)
                ]
