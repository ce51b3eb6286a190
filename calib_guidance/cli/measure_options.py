"""The options of ``evaluate``, ``reference`` and ``compare-runs``, which are read before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from calib_guidance.backend.choices import FEATURES, METRIC_OPTIONS, MODES, OF_SAMPLES, RESIZES
from calib_guidance.errors import ConfigurationError

_KINDS = """\
kinds of images (each is read in a fixed order, a batch at a time):
  run folder      of calib-guidance predict; every file is checked against its record
  FILE.npz        arr_0, uint8 (N, H, W, C), and arr_1, classes, where it is there; compressed or not
  image folder    PNG, JPEG, WebP …, at any depth; a folder for each class makes labels
  parquet         a file, a folder or a pattern ('data/train-*.parquet')
  datasets        a folder of save_to_disk, arrow files, or a hub id (uoft-cs/cifar10)
"""
_OF_REFERENCE = """
examples:
  calib-guidance reference /data/imagenet/train --size 128 --mode RGB --features inception --output imagenet128.npz
  calib-guidance reference /data/imagenet/train --size 512 --mode RGB --features inception --check img512.pkl
  calib-guidance reference uoft-cs/cifar10 --split train --features inception --keep-features --output cifar10.npz
  torchrun --nproc-per-node 8 -m calib_guidance reference /data/imagenet/train --size 256 --mode RGB --features dinov2 \\
    --output imagenet256_dinov2.npz

The file holds mu, sigma (and mu_s, sigma_s, of Inception) in float64, features and labels where they were kept, and what they
were made of and with; other programs read mu and sigma of it. Any number of processes gives the same statistics.
"""
_METRICS = "".join(f"  {option:<11}{words}\n" for option, words in METRIC_OPTIONS.items())
_OF_EVALUATE = f"""
the reference may also be a file of statistics (.npz): of calib-guidance reference, of ADM's evaluator (mu, sigma, mu_s, sigma_s,
arr_0), or mu and sigma alone (EDM, clean-fid, pytorch-fid).

metrics:
{_METRICS}  MODULE.NAME a MetricSpec of your own
By default all that the features, the reference and the options allow, but is_adm, pr_adm and mind.

examples:
  calib-guidance evaluate outputs/imagenet128/resnet101_js --reference VIRTUAL_imagenet128.npz --features inception
  calib-guidance evaluate outputs/experiments/digits/runs/*/js-relu/seed* \\
      --reference heldout.npz --features classifier:eval_classifier.yaml
  torchrun --nproc-per-node 8 -m calib_guidance evaluate samples.npz --reference /data/val --size 256 --features dinov2
"""


_OF_COMPARE = """
The runs of a pair have the same samples to make: data.seed, labels and numbers. Then most of the noise is common to both, and the
difference of a metric has a far smaller error than either value. Errors are by a delete-block jackknife over samples; the
reference counts as fixed. Metrics drawn at random (an Inception score's splits, subsets) are not compared.

examples:
  calib-guidance compare-runs outputs/plain outputs/js --reference heldout.npz --features classifier:eval_classifier.yaml
  calib-guidance compare-runs outputs/experiments/digits/runs/plain outputs/experiments/digits/runs/js --reference heldout.npz
  calib-guidance compare-runs plain/seed0 js/seed0 --pair plain/seed1 js/seed1 --pair plain/seed2 js/seed2 --reference heldout.npz
"""


def _at_least_one(text: str) -> int:
    """An option's value that must be 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _images_parser(command: str, description: str, more: str, features: str | None = None) -> argparse.ArgumentParser:
    """The options of how images are read and features extracted; ``--features`` is required where it has no default."""
    parser = argparse.ArgumentParser(
        prog=f"calib-guidance {command}",
        description=description,
        epilog=_KINDS + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = FEATURES if features is None else f"{FEATURES} (default: {features})"
    parser.add_argument("--features", required=features is None, default=features, metavar="NAME", help=known)
    words = "images at a time (default: 64)"
    parser.add_argument("--batch-size", type=_at_least_one, default=64, metavar="N", help=words)
    words = "cpu, cuda or cuda:NUMBER (default: a GPU for each process where there are enough)"
    parser.add_argument("--device", help=words)
    reading = parser.add_argument_group("reading images")
    words = "resize and crop all images to N×N; without it all must be of one size"
    reading.add_argument("--size", type=int, metavar="N", help=words)
    words = "; ".join(f"{name}: {text}" for name, text in RESIZES.items())
    reading.add_argument("--resize", choices=tuple(RESIZES), default="adm", help=f"how (default: adm). {words}")
    words = "convert all images to RGB or grayscale; without it all must be of one kind"
    reading.add_argument("--mode", choices=MODES, help=words)
    reading.add_argument("--split", help="of a data set or folder that has several (data sets: train)")
    reading.add_argument("--subset", help="of a hub data set that has several")
    for name in ("--image-column", "--label-column"):
        reading.add_argument(name, metavar="NAME", help="of a table, where it is not named as usual")
    words = "fraction of images that may be unreadable; they are skipped, named and counted (default: 0.01)"
    reading.add_argument("--max-corrupt", type=float, metavar="FRACTION", default=0.01, help=words)
    return parser


def _add_samples_reading(parser: argparse.ArgumentParser) -> None:
    """The options of reading samples otherwise than the reference."""
    own = parser.add_argument_group("reading samples, where they are tables that differ from the reference in this")
    for name in OF_SAMPLES:
        own.add_argument(f"--samples-{name.replace('_', '-')}", metavar="NAME")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """The options of what samples are measured against and with."""
    parser.add_argument("--reference", required=True, metavar="REF", help="images, or statistics of them")
    words = f"of {','.join(METRIC_OPTIONS)} (default: all that can be computed, see below)"
    parser.add_argument("--metrics", metavar="NAME,…", help=words)
    words = "classifier that names the samples' classes"
    parser.add_argument("--eval-classifier", metavar="CLASSIFIER.yaml", help=words)
    parser.add_argument("--clip", metavar="CLIP.yaml", help="CLIPClassifier with a prompt for each class")
    words = "Fréchet distances of no more samples than features, which compare only at the same number"
    parser.add_argument("--allow-few", action="store_true", help=words)
    words = "of precision and recall (default: 3)"
    parser.add_argument("--neighbors", type=_at_least_one, default=3, metavar="K", help=words)


def reference(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line after ``reference``."""
    words = "Statistics of a data set's features (mean and covariance), which calib-guidance evaluate measures samples against."
    parser = _images_parser("reference", words, _OF_REFERENCE)
    parser.add_argument("source", metavar="SOURCE", help="the images, see below")
    words = "to make; nothing is overwritten"
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help=words)
    words = (
        "in place of --output: whether a file of statistics (.npz, or .pkl of EDM2) is of these images; where it is not, other "
        "resizes and JPEG are tried and the closest is named"
    )
    parser.add_argument("--check", metavar="FILE", help=words)
    words = (
        "keep the features of every image too, for precision and recall, density and coverage, KID and classes: four bytes each, "
        "410 MB of 50,000 images with Inception"
    )
    parser.add_argument("--keep-features", action="store_true", help=words)
    options = parser.parse_args(list(args))
    if (options.check is None) == (options.output is None):
        parser.error("expected --output FILE.npz to write, or --check FILE to compare with, and not both")
    return options


def evaluate(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line after ``evaluate``; argparse's exit with status 2 where they are none."""
    words = (
        "How good samples are, against a reference: every metric with its uncertainty and its provenance. Several sets of "
        "samples, such as the same run with several seeds, also give mean ± standard deviation."
    )
    parser = _images_parser("evaluate", words, _OF_EVALUATE, "inception")
    parser.add_argument("samples", nargs="+", metavar="SAMPLES", help="the images, see below")
    _add_measures(parser)
    words = "also the Fréchet distance at infinitely many samples"
    parser.add_argument("--extrapolate", action="store_true", help=words)
    words = "real images, or statistics of them: also FDr, the Fréchet distance over theirs (as REF: read like the reference)"
    parser.add_argument("--validation", metavar="VAL", help=words)
    words = (
        "folder for metrics.json, metrics.md and predictions.npz (default: RUN/evaluation of a run folder, else "
        "outputs/evaluation/NAME). Of several sets, for their mean and a folder of each that is not a run folder (default: "
        "outputs/evaluation): what is measured of a run always stands in RUN/evaluation then, where report finds it"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=words)
    _add_samples_reading(parser)
    return parser.parse_args(list(args))


def compare_runs(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line after ``compare-runs``."""
    words = (
        "The difference of every metric between two runs with common noise, its 95 % interval, and the smallest difference that "
        "so many samples can resolve. Differences are A − B."
    )
    parser = _images_parser("compare-runs", words, _OF_COMPARE, "inception")
    words_a = "a run folder, a row of an experiment (with seed0, …), or other images, see below"
    parser.add_argument("a", metavar="A", help=words_a)
    parser.add_argument("b", metavar="B", help="what it is compared with")
    words = "another pair, such as the same settings with another seed; may be repeated. Differences are then means over pairs"
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("A", "B"), help=words)
    words = "blocks of the jackknife (default: 30)"
    parser.add_argument("--blocks", type=int, default=30, metavar="N", help=words)
    _add_measures(parser)
    words = "folder for comparison.json and comparison.md (default: outputs/comparison)"
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), metavar="DIR", help=words)
    _add_samples_reading(parser)
    options = parser.parse_args(list(args))
    if options.blocks < 2:
        parser.error(f"argument --blocks: must be at least 2, got {options.blocks}")
    return options


def check_files(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for a file that is not there. What looks like no file may be a name on the hub."""
    for name in ("samples", "source", "a", "b", "reference", "validation", "eval_classifier", "clip"):
        given = getattr(options, name, None)
        for text in given if isinstance(given, list) else [given or ""]:
            path = Path(text).expanduser()
            is_file = (
                path.is_absolute() or path.suffix in (".npz", ".pkl", ".parquet", ".yaml") or text[:1] in (".", "~")
            )
            if text and is_file and not {*"*?["} & {*text} and not path.exists():
                option = name.upper() if name in ("samples", "source", "a", "b") else f"--{name.replace('_', '-')}"
                raise ConfigurationError(f"{option} {text}: no such file or folder")
