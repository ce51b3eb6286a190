"""The commands ``calib-guidance evaluate SAMPLES … --reference REF`` and ``calib-guidance reference SOURCE --output FILE``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import check_writable
from calib_guidance.backend.distributed import DistributedContext, distributed_context
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers import CLIPClassifier
from calib_guidance.data.base import listed
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.imagenet import read_class_names, same_classes
from calib_guidance.data.preprocess import MODES, RESIZES
from calib_guidance.data.source import RunImages
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.check import check_reference, refuse_both
from calib_guidance.evaluation.features import FORMS, ClassifierFeatures, features_from_name, read_classifier
from calib_guidance.evaluation.metrics import OPTIONS, select, unmet
from calib_guidance.evaluation.quality import Quality, described_statistics, write_evaluation, write_summary
from calib_guidance.evaluation.spec import NO_FEATURES, Measures, MetricSpec
from calib_guidance.evaluation.statistics import ReferenceStatistics, check_output, versions

_OF_SAMPLES = ("split", "subset", "image_column", "label_column")  # which the two sets may have differently
_ASKED = ("is_adm", "pr_adm", "mind")  # conventions of others, which are measured where they are named
_READING = ("size", "resize", "mode", "max_corrupt", *_OF_SAMPLES)
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
_METRICS = "".join(f"  {option:<11}{words}\n" for option, words in OPTIONS.items())
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


def _at_least_one(text: str) -> int:
    """An option's value that must be 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def images_parser(command: str, description: str, more: str, features: str | None = None) -> argparse.ArgumentParser:
    """The options of how images are read and features extracted; ``--features`` is required where it has no default."""
    parser = argparse.ArgumentParser(
        prog=f"calib-guidance {command}",
        description=description,
        epilog=_KINDS + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = FORMS if features is None else f"{FORMS} (default: {features})"
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


def reading(options: argparse.Namespace, samples: bool = False) -> dict[str, Any]:
    """Options of ``ImageSet``."""
    names = {name: f"samples_{name}" if samples and name in _OF_SAMPLES else name for name in _READING}
    return {name: getattr(options, option) for name, option in names.items()}


def reference(args: Sequence[str]) -> None:
    """``calib-guidance reference``, of the arguments after ``reference``: see its ``--help``."""
    words = "Statistics of a data set's features (mean and covariance), which calib-guidance evaluate measures samples against."
    parser = images_parser("reference", words, _OF_REFERENCE)
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
    refuse_both(options.check, options.output)
    if options.check is not None:
        with distributed_context(options.device) as processes:
            extractor = features_from_name(options.features)
            check_reference(options.check, options.source, reading(options), extractor, options.batch_size, processes)
        return
    check_output(options.output)
    with distributed_context(options.device) as processes:
        images = ImageSet(options.source, **reading(options))
        if processes.is_first:
            print(images.source.summary())
        extractor, started = features_from_name(options.features), time.perf_counter()
        statistics = ReferenceStatistics.open(images)
        statistics.measured(extractor, options.batch_size, options.keep_features, processes=processes)
        if processes.is_first:
            sha256 = statistics.save(options.output)
            seconds = time.perf_counter() - started
            workers = "1 process" if processes.world_size == 1 else f"{processes.world_size} processes"
            print(f"wrote {options.output} in {seconds:.0f} s with {workers} on {processes.device.type}")
            print(f"            sha256 {sha256}", *described_statistics(statistics), sep="\n")


def add_samples_reading(parser: argparse.ArgumentParser) -> None:
    """The options of reading samples otherwise than the reference."""
    own = parser.add_argument_group("reading samples, where they are tables that differ from the reference in this")
    for name in _OF_SAMPLES:
        own.add_argument(f"--samples-{name.replace('_', '-')}", metavar="NAME")


def add_measures(parser: argparse.ArgumentParser) -> None:
    """The options of what samples are measured against and with."""
    parser.add_argument("--reference", required=True, metavar="REF", help="images, or statistics of them")
    words = f"of {','.join(OPTIONS)} (default: all that can be computed, see below)"
    parser.add_argument("--metrics", metavar="NAME,…", help=words)
    words = "classifier that names the samples' classes"
    parser.add_argument("--eval-classifier", metavar="CLASSIFIER.yaml", help=words)
    parser.add_argument("--clip", metavar="CLIP.yaml", help="CLIPClassifier with a prompt for each class")
    words = "Fréchet distances of no more samples than features, which compare only at the same number"
    parser.add_argument("--allow-few", action="store_true", help=words)
    words = "of precision and recall (default: 3)"
    parser.add_argument("--neighbors", type=_at_least_one, default=3, metavar="K", help=words)


def read_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line after ``evaluate``; argparse's exit with status 2 where they are none."""
    words = (
        "How good samples are, against a reference: every metric with its uncertainty and its provenance. Several sets of "
        "samples, such as the same run with several seeds, also give mean ± standard deviation."
    )
    parser = images_parser("evaluate", words, _OF_EVALUATE, "inception")
    parser.add_argument("samples", nargs="+", metavar="SAMPLES", help="the images, see below")
    add_measures(parser)
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
    add_samples_reading(parser)
    return parser.parse_args(list(args))


def evaluate(args: Sequence[str]) -> None:
    """``calib-guidance evaluate``, of the arguments after ``evaluate``: see its ``--help``."""
    options = read_options(args)
    with distributed_context(options.device) as processes:
        _evaluate(options, processes)


def _evaluate(options: argparse.Namespace, processes: DistributedContext) -> None:
    sets = [ImageSet(source, **reading(options, samples=True)) for source in options.samples]
    together = options.output or Path("outputs/evaluation")
    names = _names(sets)
    folders = [options.output]
    if len(sets) > 1 or options.output is None:
        sources = [samples.source for samples in sets]
        runs = (source.run.path / "evaluation" if isinstance(source, RunImages) else None for source in sources)
        folders = [run or together / name for run, name in zip(runs, names, strict=True)]
    for folder in folders if len(sets) == 1 else (*folders, together):
        check_writable(folder, "--output")
    quality = open_quality(options, sets, processes, options.extrapolate, options.validation)
    found = []
    for samples, folder in zip(sets, folders, strict=True):
        results = quality.measure(samples, progress=True)
        if options.metrics is None and quality.reference.features is None:
            results["notes"].append(f"kid, pr, dc and classwise skipped: {NO_FEATURES}")
        results["notes"] += [*samples.notes, *_other_reference(samples, quality.reference)]
        results["num_samples"] = results["num_measured"]
        results["provenance"]["versions"] = versions()
        found.append(results)
        if processes.is_first:
            write_evaluation(folder, results, quality)
    if processes.is_first and len(sets) > 1:
        write_summary(together, names, found)


def _other_reference(samples: ImageSet, reference: ReferenceStatistics) -> list[str]:
    """A note where a run's own configuration, such as that of a published row, names another file of statistics."""
    path = samples.source.run.path / "config.yaml" if isinstance(samples.source, RunImages) else None
    if path is None or not path.is_file():
        return []
    callbacks = (read_yaml(path).get("trainer") or {}).get("callbacks") or []
    named = [(callback.get("init_args") or {}).get("reference") for callback in callbacks]
    files = [Path(name).name for name in named if isinstance(name, str) and name.endswith((".npz", ".pkl"))]
    if not files or Path(reference.name).name in files:
        return []
    return [
        f"the run's configuration names the reference {files[0]}, that of its published values; values against "
        f"{reference.name} do not compare with these"
    ]


def open_quality(
    options: argparse.Namespace,
    sets: Sequence[ImageSet],
    processes: DistributedContext,
    extrapolate: bool = False,
    validation: str | None = None,
) -> Quality:
    """What measures the sets, checked against them before the first image goes through a network."""
    reference = ReferenceStatistics.open(options.reference, **reading(options))
    if processes.is_first:
        opened = [*sets, reference.images] if reference.mean is None else sets
        print("\n".join(images.source.summary() for images in opened))
    # All that can be refused is, before weights are downloaded and before the first image goes through a network.
    for samples in sets:
        reference.check_shape(samples.name, samples.image_shape)
    extractor = features_from_name(options.features)
    eval_classifier = None if options.eval_classifier is None else read_classifier(options.eval_classifier)
    clip = None if options.clip is None else read_classifier(options.clip)
    if clip is not None and not isinstance(clip, CLIPClassifier):
        raise ConfigurationError(f"--clip: {options.clip} describes {type(clip).__name__}, not CLIPClassifier")
    measures = Measures(extractor, eval_classifier, clip, options.neighbors, not options.allow_few, extrapolate)
    if reference.mean is not None:
        reference.check(extractor)
    if validation is not None:
        held = ReferenceStatistics.open(validation, **reading(options))
        held.check_shape(f"--validation {held.name}", sets[0].image_shape)
        held.measured(extractor, options.batch_size, spatial=False, processes=processes)
        measures = measures._replace(validation=held)
    specs = _metrics(options.metrics, measures, reference, sets)
    for samples in sets:
        _check_classes(samples, reference, measures, {need for spec in specs for need in spec.needs})
    shapes = [samples.image_shape for samples in sets]
    return Quality(specs, measures, reference, options.batch_size, processes, shapes)


def _check_classes(
    samples: ImageSet, reference: ReferenceStatistics, measures: Measures, needs: Collection[str]
) -> None:
    """Raise ConfigurationError where metrics compare class numbers that mean other classes by their names."""
    own, classifier, others = samples.source.class_names, measures.classifier, {}
    if "reference_labels" in needs and reference.mean is None:
        others[f"the reference {reference.name}"] = reference.images.source.class_names
    if "predictions" in needs and classifier is not None:
        others["the evaluation classifier"] = read_class_names(classifier.class_names, classifier.num_classes)
    for what, names in others.items():
        if not same_classes(own, names):
            raise ConfigurationError(
                f"{samples.name} numbers the classes {listed(own)}, {what} {listed(names)}: equal numbers must mean equal "
                "classes. Name class folders alike, with empty ones for classes without images, or name --metrics without classes"
            )


def _metrics(
    asked: str | None, measures: Measures, reference: ReferenceStatistics, sets: Sequence[ImageSet]
) -> tuple[MetricSpec, ...]:
    """The metrics that are asked for, or all whose needs are met: but for ADM's conventions, and the Inception score of the
    classes of ClassifierFeatures, like no published one.
    """
    if asked is None:
        own_classes = isinstance(measures.extractor, ClassifierFeatures)
        names = [name for name in OPTIONS if name not in _ASKED and not (name == "is" and own_classes)]
        missing = measures.missing(reference).keys()
        specs = tuple(spec for spec in select(names, measures.extractor) if missing.isdisjoint(spec.needs))
    else:
        specs = select([name.strip() for name in asked.split(",")], measures.extractor)
    # What too few samples do to a Fréchet distance is not left to a note among the others: it is the metric that is looked for.
    fatal = {
        name: f"{name} cannot be taken of {samples.name}: {reason}"
        for samples in sets
        for name, reason in unmet(specs, measures, reference, samples).items()
        if asked is not None or name == "fid"
    }
    if fatal:
        raise ConfigurationError("; ".join(fatal.values()))
    return specs


def _names(sets: Sequence[ImageSet]) -> list[str]:
    """A name for each set: as many of the last parts of its path as it takes to tell them apart."""
    paths = [Path(samples.name).expanduser().resolve().with_suffix("") for samples in sets]
    if len(set(paths)) != len(paths):
        raise ConfigurationError("evaluate: the same samples are named twice")
    words = 1
    while len({path.parts[-words:] for path in paths}) != len(paths):
        words += 1
    return ["-".join(path.parts[-words:]) for path in paths]
