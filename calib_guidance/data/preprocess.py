"""Decoding and cropping of images: one rule for training data, samples and references.

Images become 8-bit grey or RGB. Alpha is dropped (the colors beneath count, as in torch-fidelity), 16 bits are divided by 257,
and the orientation that EXIF states is ignored, as it was for the published classifiers and reference batches.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from calib_guidance.data.base import Row
from calib_guidance.errors import ConfigurationError

RESIZES = {
    "adm": "halved (box) while both sides stay at least the size, shorter side to the size (bicubic), middle cropped: ADM",
    "lanczos": "middle square cropped, then resized (Lanczos): StyleGAN's and EDM's dataset tools",
}
MODES = ("RGB", "L")
# What may have to be done to an image before it is grey or RGB. Place in the list = bit in the record of each image.
CONVERSIONS = (
    "alpha channel dropped, all of it opaque",
    "alpha channel dropped of transparent images: the colors beneath count, as in torch-fidelity",
    "palette, CMYK and others to RGB",
    "grey to RGB",
    "RGB to grey",
    "enlarged to the size",
    "16 bits to 8, divided by 257",
)
_OPAQUE, _TRANSPARENT, _TO_RGB, _GREY_TO_RGB, _RGB_TO_GREY, _ENLARGED, _DEEP = (1 << b for b in range(len(CONVERSIONS)))
# What PIL's decoders raise on damaged files.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableImageError(Exception):
    """The reason why an image cannot be read. It is the same each time that the image is read."""


def contents(row: Row) -> bytes:
    """The encoded image, or its pixels; UnreadableImageError where its file cannot be read."""
    try:
        if isinstance(row.image, Path):
            return row.image.read_bytes()
        if isinstance(row.image, str):
            with fsspec.open(row.image, "rb") as file:
                return file.read()
    except OSError as error:
        dangling = isinstance(row.image, Path) and row.image.is_symlink() and not row.image.exists()
        raise UnreadableImageError("dangling link" if dangling else error.strerror or repr(error)) from error
    return row.image


def image_size(row: Row) -> tuple[int, int]:
    """Height and width of an image, from the head of its file; UnreadableImageError where it cannot be read."""
    try:
        with Image.open(row.image if isinstance(row.image, Path) else io.BytesIO(contents(row))) as picture:
            return picture.height, picture.width
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(repr(error)) from error


def decode(image: bytes | np.ndarray, mode: str | None, name: str) -> tuple[Image.Image, int]:
    """An image as grey or RGB, and what was done to it (bits of :data:`CONVERSIONS`).

    Args:
        image: encoded, or pixels (H, W, C).
        mode: ``RGB`` or ``L`` that it is converted to; None keeps grey images grey.
        name: for messages.

    Raises:
        UnreadableImageError: it is damaged, or not an image.
    """
    try:
        if isinstance(image, np.ndarray):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        else:
            picture = Image.open(io.BytesIO(image))
            picture.load()
    except _DECODING_ERRORS as error:
        # PIL's own message names an address in memory.
        why = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise UnreadableImageError(why) from error
    picture, done = _grey_or_rgb(picture, name)
    if mode is not None and picture.mode != mode:
        done |= _GREY_TO_RGB if mode == "RGB" else _RGB_TO_GREY
        picture = picture.convert(mode)
    return picture, done


def _grey_or_rgb(picture: Image.Image, name: str) -> tuple[Image.Image, int]:
    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.int32)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)), _DEEP
    if picture.mode in ("I", "F"):
        raise ConfigurationError(f"{name} has 32 bits a channel (mode {picture.mode}): save it with 8 or 16 bits")
    if picture.mode in ("L", "RGB"):
        done = 0
        if "transparency" in picture.info:  # one color stands for transparent
            done = _TRANSPARENT if picture.convert("RGBA").getextrema()[-1][0] < 255 else _OPAQUE
        return picture, done
    if picture.mode == "1":
        return picture.convert("L"), 0
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        straight = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
        done = _OPAQUE if straight.getextrema()[-1][0] == 255 else _TRANSPARENT
        return straight.convert("L" if straight.mode == "LA" else "RGB"), done
    return picture.convert("RGB"), _TO_RGB


def crop(picture: Image.Image, size: int, resize: str) -> tuple[Image.Image, int]:
    """The image at ``size`` × ``size`` by one of :data:`RESIZES`, and what was done to it (bits of :data:`CONVERSIONS`)."""
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
