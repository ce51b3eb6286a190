"""Decoding and cropping of images: one rule for training data, samples and references.

Images become 8-bit gray or RGB. 16 bits v become round(v / 257); alpha is dropped (the colors beneath count, as in
torch-fidelity); the orientation that EXIF states is ignored, as it was for the published classifiers and reference batches; of
several frames or pages the first counts.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from calib_guidance.backend.distributed import available_cores
from calib_guidance.data.base import ImageSource, Row

# What may have to be done to an image before it is gray or RGB. Place in the list = bit in the record of each image.
CONVERSIONS = (
    "alpha channel dropped, all of it opaque",
    "alpha channel dropped of transparent images: the colors beneath count, as in torch-fidelity",
    "palette, CMYK and others to RGB",
    "gray to RGB",
    "RGB to gray",
    "enlarged to the size",
    "16 bits to 8, divided by 257",
    "16 bits to 8, the low byte dropped by Pillow",
    "orientation of EXIF ignored",
    "the first of several frames or pages",
)
_OPAQUE, _TRANSPARENT, _TO_RGB, _GRAY_TO_RGB, _RGB_TO_GRAY, _ENLARGED, _DEEP, _HIGH_BYTE, _TURNED, FIRST_FRAME = (
    1 << b for b in range(len(CONVERSIONS))
)
_LONGEST = 1000  # times the shorter side: resized by the shorter side, a longer image fills the memory
# Pillow turns TIFF files as EXIF states; the way back.
_BACK = dict(enumerate((0, 3, 1, 5, 2, 6, 4), 2))
# What decoders raise on damaged files.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableImageError(Exception):
    """Why an image cannot be read; the same each time that it is read."""


def contents(row: Row) -> bytes | np.ndarray:
    """The encoded image, or its pixels; UnreadableImageError where its file cannot be read."""
    try:
        if isinstance(row.image, Path):
            if row.image.exists() and not row.image.is_file():  # a FIFO would never end
                raise UnreadableImageError("not a file")
            return row.image.read_bytes()
        if isinstance(row.image, str):
            import fsspec

            with fsspec.open(row.image, "rb") as file:
                return file.read()
    except OSError as error:
        dangling = isinstance(row.image, Path) and row.image.is_symlink() and not row.image.exists()
        raise UnreadableImageError("dangling link" if dangling else error.strerror or repr(error)) from error
    return row.image


def image_size(row: Row) -> tuple[int, int]:
    """Height and width of an image, from the head of its file; UnreadableImageError where it cannot be read."""
    file = row.image if isinstance(row.image, Path) and row.image.is_file() else io.BytesIO(contents(row))
    try:
        with _opened(file) as picture:
            turned = picture.format == "TIFF" and _orientation(picture) >= 5
            return picture.size if turned else picture.size[::-1]
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(repr(error)) from error


def decode(image: bytes | np.ndarray, mode: str | None = None) -> tuple[Image.Image, int]:
    """An encoded image, or pixels (H, W, C), as gray or RGB, in a ``mode`` if one is given; and bits of :data:`CONVERSIONS`."""
    try:
        picture, done = _read(image)
    except _DECODING_ERRORS as error:
        # PIL's own message names an address in memory.
        why = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise UnreadableImageError(why) from error
    picture, converted = _gray_or_rgb(picture)
    if mode is not None and picture.mode != mode:
        converted |= _GRAY_TO_RGB if mode == "RGB" else _RGB_TO_GRAY
        picture = picture.convert(mode)
    return picture, done | converted


def _opened(file: Path | io.BytesIO) -> Image.Image:
    picture = Image.open(file)
    if max(picture.size) > _LONGEST * min(picture.size):
        width, height = picture.size
        raise UnreadableImageError(f"{width:,}×{height:,} pixels, a side above {_LONGEST:,} times the other: crop it")
    return picture


def _read(image: bytes | np.ndarray) -> tuple[Image.Image, int]:
    """All pixels of an image, 8 bits a channel or one channel of any."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), 0
    picture = _opened(io.BytesIO(image))
    done = FIRST_FRAME if getattr(picture, "is_animated", False) else 0
    layout, orientation = str(picture.tile[0][3]) if picture.tile else "", _orientation(picture)
    if ";16" in layout and picture.mode != "I;16" and picture.format == "PNG":  # Pillow reads the high byte
        from torchvision.io import decode_png

        try:
            deep = decode_png(torch.frombuffer(bytearray(image), dtype=torch.uint8)).permute(1, 2, 0)
        except RuntimeError as error:
            raise UnreadableImageError("a damaged PNG") from error
        picture, done = Image.fromarray(_to_8_bits(deep.int().numpy())), done | _DEEP
    else:
        picture.load()
        done |= _HIGH_BYTE if ";16" in layout and not picture.mode.startswith("I") else 0
        if picture.format == "TIFF" and orientation in _BACK:
            picture = picture.transpose(_BACK[orientation])
    return picture, done | (_TURNED if orientation in _BACK else 0)


def _orientation(picture: Image.Image) -> int:
    """1 … 8 as EXIF numbers them; 1 where it is not stated, or damaged."""
    with contextlib.suppress(*_DECODING_ERRORS):
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _to_8_bits(deep: np.ndarray) -> np.ndarray:
    return ((deep.astype(np.int32) + 128) // 257).astype(np.uint8)


def _gray_or_rgb(picture: Image.Image) -> tuple[Image.Image, int]:
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(picture))), _DEEP
    if picture.mode in ("I", "F"):
        raise UnreadableImageError(f"32 bits a channel, mode {picture.mode}: save it with 8 or 16 bits")
    if picture.mode == "1":
        return picture.convert("L"), 0
    done = 0
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        straight = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
        done = _OPAQUE if straight.getextrema()[-1][0] == 255 else _TRANSPARENT
        if picture.mode not in ("L", "RGB"):  # of these one color stands for transparent
            return straight.convert("L" if straight.mode == "LA" else "RGB"), done
    return (picture, done) if picture.mode in ("L", "RGB") else (picture.convert("RGB"), _TO_RGB)


def corrupt_images(source: ImageSource) -> list[str]:
    """``name (reason)`` of every image of a source that cannot be read."""

    def problem(row: Row) -> str | None:
        try:
            decode(contents(row))
        except UnreadableImageError as error:
            return f"{row.name} ({error})"

    blocks = (range(i, min(i + 256, source.num_images)) for i in range(0, source.num_images, 256))
    with ThreadPoolExecutor(available_cores()) as pool:  # decoders release Python's lock
        return [found for rows in source.read(blocks) for found in pool.map(problem, rows) if found]


def crop(picture: Image.Image, size: int, resize: str) -> tuple[Image.Image, int]:
    """The image at ``size`` × ``size`` by one of ``choices.RESIZES``, and what was done to it (bits of :data:`CONVERSIONS`)."""
    done = _ENLARGED if min(picture.size) < size else 0
    if resize == "lanczos":
        return _middle(picture, min(picture.size)).resize((size, size), Image.Resampling.LANCZOS), done
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return _middle(picture, size), done


def _middle(picture: Image.Image, side: int) -> Image.Image:
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
