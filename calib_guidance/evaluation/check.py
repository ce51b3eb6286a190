"""Whether a file of statistics is of the images that it is said to be of, and how these were made where it is not."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calib_guidance.backend.choices import RESIZES
from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.evaluation.features import FeatureExtractor, Features
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.metrics.frechet import frechet_distance

_SAME = 1e-4  # of the trace of the covariance: decoders of JPEG differ by less, resizes by more
_QUALITIES = (95, 75)


class _Recompressed(FeatureExtractor):
    """Features of images after a round trip through JPEG."""

    def __init__(self, extractor: FeatureExtractor, quality: int):
        super().__init__()
        self.extractor, self.quality, self.kind, self.width = extractor, quality, extractor.kind, extractor.width
        self.name = f"{extractor.name}, of images after JPEG of quality {quality}"

    def forward(self, images: Tensor) -> Features:
        back = []
        for pixels in images.cpu().permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
                file, "JPEG", quality=self.quality
            )
            decoded = np.asarray(Image.open(file))
            back.append(torch.from_numpy(np.array(decoded[None] if decoded.ndim == 2 else decoded.transpose(2, 0, 1))))
        return self.extractor(torch.stack(back).to(images.device))


def _variants(reading: Mapping[str, Any], extractor: FeatureExtractor) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """What may have been done to the images: its name, options of reading, and the extractor. The first is as asked."""
    yield "these images", dict(reading), extractor
    if reading.get("size") is not None:
        for resize in RESIZES:
            if resize != reading["resize"]:
                yield f"these images, --resize {resize}", {**reading, "resize": resize}, extractor
    for quality in _QUALITIES:
        yield f"these images after JPEG of quality {quality}", dict(reading), _Recompressed(extractor, quality)


def check_reference(
    path: str,
    source: str,
    reading: Mapping[str, Any],
    extractor: FeatureExtractor,
    batch_size: int,
    processes: DistributedContext,
) -> list[tuple[str, float]]:
    """Print how far the statistics of a file are from those of images, read as asked and, where that differs, otherwise.

    Returns:
        Each variant that was measured with its Fréchet distance; the last one is the file's where any is.
    """
    known = ReferenceStatistics.read(path)
    known.check(extractor)
    trace, found = float(known.covariance.trace()), []
    for name, options, features in _variants(reading, extractor):
        images = ImageSet(source, **options)
        known.check_shape(images.name, images.image_shape)
        made = ReferenceStatistics.open(images).measured(features, batch_size, spatial=False, processes=processes)
        distance = frechet_distance(known.mean, known.covariance, made.mean, made.covariance)
        found.append((name, float(distance)))
        if processes.is_first:
            print(f"  {float(distance):12.6g}  {float(distance) / trace:8.1e} of tr Σ  {name}")
        if float(distance) < _SAME * trace:
            break
    if processes.is_first:
        print(_verdict(path, found, trace, known.num_images, made.num_images))
    return found


def _verdict(path: str, found: list[tuple[str, float]], trace: float, in_file: int | None, here: int | None) -> str:
    name, distance = min(found, key=lambda pair: pair[1])
    if distance < _SAME * trace:
        return f"{path} has the statistics of {name}"
    count = f"; it is of {in_file:,} images, here are {here:,}" if in_file not in (None, here) else ""
    return f"{path} has the statistics of other images, or of another preprocessing{count}. The closest: {name}"
