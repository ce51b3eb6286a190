"""x̂0 along the trajectory, as a moving picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calib_guidance.backend.atomic import atomic_path
from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import PathLike

_LEAST, _MOST = 96, 160  # pixels of a tile: smaller images are enlarged, larger ones reduced
_GAP, _LINE = 8, 20
_MILLISECONDS, _LAST = 120, 2000  # of a frame; of the last one, the images


def _tile(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A uint8 image ``(C, H, W)``, gray or RGB. Enlarged pixels stay sharp."""
    pixels = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).convert("RGB")
    enlarged = size[0] >= pixels.width
    return pixels.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's, which has more letters than that of Pillow."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 12)


def _fitting(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """A text, shortened to a width in pixels."""
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def animation(
    x0: Sequence,
    t: Sequence[float],
    names: Sequence[str],
    path: PathLike,
    real: Sequence[np.ndarray | None] = (),
) -> list[Path]:
    """x̂0 of some samples, a frame for each step, as a GIF that repeats: samples side by side, their names above them.

    Args:
        x0: uint8 ``(samples, steps, C, H, W)``, from noise to image.
        t: ``(steps,)`` of the full process, written below.
        names: ``(samples,)``, e.g. of the classes.
        path: without ending.
        real: for each sample a real image of its class, uint8 ``(C, H, W)``, to show below it, or None.
    """
    x0 = np.asarray(x0)
    if x0.ndim != 5 or 0 in x0.shape[:2]:
        raise ConfigurationError("there is no trajectory to animate: no sample or no step was kept")
    samples, steps, _, h, w = x0.shape
    factor = max(1, math.ceil(_LEAST / max(h, w))) if max(h, w) < _LEAST else min(1, _MOST / max(h, w))
    size = round(w * factor), round(h * factor)
    beside = any(image is not None for image in real)
    width, row = samples * (size[0] + _GAP) + _GAP, size[1] + _GAP
    still = Image.new("RGB", (width, _LINE + row + (_LINE + row if beside else 0) + _LINE + _GAP), "white")
    draw, font = ImageDraw.Draw(still), _font()
    lefts = [_GAP + k * (size[0] + _GAP) for k in range(samples)]
    for left, name in zip(lefts, names, strict=True):
        text = _fitting(name, size[0], draw, font)
        draw.text((left + (size[0] - draw.textlength(text, font)) / 2, 2), text, "black", font)
    if beside:
        draw.text((_GAP, _LINE + row), "real images of the same classes", "gray", font)
        for left, image in zip(lefts, real, strict=True):
            if image is not None:
                still.paste(_tile(image, size), (left, 2 * _LINE + row))
    frames = []
    for j in range(steps):
        frame = still.copy()
        for left, images in zip(lefts, x0, strict=True):
            frame.paste(_tile(images[j], size), (left, _LINE))
        draw, below = ImageDraw.Draw(frame), still.height - _LINE - _GAP
        draw.text((_GAP, below + 2), f"prediction at t = {t[j]:.0f}", "black", font)
        done = (width - 2 * _GAP) * (j + 1) / steps
        draw.rectangle((_GAP, still.height - 5, _GAP + done, still.height - 3), fill="#0072B2")
        gray = len(x0[0, 0]) == 1
        dither = Image.Dither.NONE if gray else Image.Dither.FLOYDSTEINBERG
        frames.append(frame.quantize(128 if gray else 256, dither=dither))
    target = Path(path).with_name(Path(path).name.removesuffix(".gif") + ".gif")
    durations = [_MILLISECONDS] * (steps - 1) + [_LAST]
    with atomic_path(target) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return [target]
