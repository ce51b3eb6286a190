"""``calib-guidance reference SOURCE --output FILE.npz --features …``: statistics of a data set, to measure samples against."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.distributed import DistributedContext, distributed_context
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.preprocess import MODES, RESIZES
from calib_guidance.evaluation.features import FORMS, features_from_name
from calib_guidance.evaluation.output import described_features, described_images
from calib_guidance.evaluation.statistics import ReferenceStatistics, check_output
from calib_guidance.metrics.frechet import sample_count_note

READING = ("size", "resize", "mode", "split", "subset", "image_column", "label_column", "max_corrupt")
KINDS = """\
kinds of images (each is read in a fixed order, a batch at a time):
  run folder      of calib-guidance predict; every file is checked against its record
  FILE.npz        arr_0, uint8 (N, H, W, C), and arr_1, classes, where it is there; compressed or not
  image folder    PNG, JPEG, WebP …, at any depth; a folder for each class makes labels
  parquet         a file, a folder or a pattern ('data/train-*.parquet')
  datasets        a folder of save_to_disk, arrow files, or a hub id (uoft-cs/cifar10)
"""
_EXAMPLES = """
examples:
  calib-guidance reference /data/imagenet/train --size 128 --mode RGB --features inception --output imagenet128.npz
  calib-guidance reference uoft-cs/cifar10 --split train --features inception --keep-features --output cifar10.npz
  torchrun --nproc-per-node 8 -m calib_guidance reference /data/imagenet/train --size 256 --mode RGB --features dinov2 \\
    --output imagenet256_dinov2.npz

The file holds mu, sigma (and mu_s, sigma_s, of Inception) in float64, features and labels where they were kept, and what they
were made of and with; other programs read mu and sigma of it. Any number of processes gives the same statistics.
"""


def at_least_one(text: str) -> int:
    """An option's value that must be 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def add_measuring_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options on how features are extracted; ``--features`` is required where it has no default."""
    known = "" if default is None else f" (default: {default})"
    parser.add_argument("--features", required=default is None, default=default, metavar="NAME", help=f"{FORMS}{known}")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=64, metavar="N", help="images at a time (default: 64)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:NUMBER (default: a GPU for each process where there are enough)"
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """What :class:`~calib_guidance.data.image_sets.ImageSet` has to be told, as options."""
    reading = parser.add_argument_group("reading images")
    reading.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="resize and crop all images to N×N; without it all must be of one size",
    )
    how = "; ".join(f"{name}: {words}" for name, words in RESIZES.items())
    reading.add_argument("--resize", choices=tuple(RESIZES), default="adm", help=f"how (default: adm). {how}")
    reading.add_argument(
        "--mode", choices=MODES, help="convert all images to RGB or grayscale; without it all must be of one kind"
    )
    reading.add_argument("--split", help="of a data set or folder that has several (data sets: train)")
    reading.add_argument("--subset", help="of a hub data set that has several")
    reading.add_argument("--image-column", metavar="NAME", help="of a table, where it is not named as usual")
    reading.add_argument("--label-column", metavar="NAME", help="of a table, where it is not named as usual")
    reading.add_argument(
        "--max-corrupt",
        type=float,
        metavar="FRACTION",
        default=0.01,
        help="fraction of images that may be unreadable; they are skipped, named and counted (default: 0.01)",
    )


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those options for ``ImageSet``."""
    return {name: getattr(options, name) for name in READING}


def _lines(statistics: ReferenceStatistics) -> list[str]:
    """What was made of what, for people."""
    images = statistics.provenance["images"]
    lines = [
        f"images      {described_images(images, statistics.num_images, 64)}; {images['decoder']}",
        *(f"            {count:,}: {name}" for name, count in images["conversions"].items()),
        f"features    {described_features(statistics.provenance['features'], 64)}",
    ]
    widths = [f"mu, sigma of {len(statistics.mean)} features"]
    if statistics.spatial_mean is not None:
        widths.append(f"mu_s, sigma_s of {len(statistics.spatial_mean)} spatial ones")
    if statistics.features is not None:
        kept = "with labels" if statistics.labels is not None else "without labels, which are not known"
        widths.append(f"the features of {len(statistics.features):,} images ({kept})")
    lines.append(f"holds       {'; '.join(widths)}")
    note = sample_count_note(statistics.num_images, len(statistics.mean))
    return lines + ([f"note        {note}"] if note else [])


def reference(args: Sequence[str]) -> None:
    """``calib-guidance reference``, of the arguments after ``reference``: see its ``--help``."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance reference",
        description="Statistics of a data set's features (mean and covariance), which calib-guidance evaluate measures samples "
        "against.",
        epilog=KINDS + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="the images, see below")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.npz", help="to make; nothing is overwritten"
    )
    parser.add_argument(
        "--keep-features",
        action="store_true",
        help="keep the features of every image too, for precision and recall, density and coverage, KID and classes: four bytes "
        "each, 410 MB of 50,000 images with Inception",
    )
    add_measuring_options(parser)
    add_reading_options(parser)
    options = parser.parse_args(list(args))
    check_output(options.output)
    with distributed_context(options.device) as processes:
        _make(options, processes)


def _make(options: argparse.Namespace, processes: DistributedContext) -> None:
    images = ImageSet(options.source, **reading_options(options))
    if processes.is_first:
        print(images.source.summary())
    extractor = features_from_name(options.features)
    started = time.perf_counter()
    statistics = ReferenceStatistics.from_images(
        images, extractor, options.batch_size, options.keep_features, processes=processes
    )
    if processes.is_first:
        sha256 = statistics.save(options.output)
        seconds = time.perf_counter() - started
        workers = "1 process" if processes.world_size == 1 else f"{processes.world_size} processes"
        print(f"wrote {options.output} in {seconds:.0f} s with {workers} on {processes.device.type}")
        print(f"            sha256 {sha256}")
        print("\n".join(_lines(statistics)))
