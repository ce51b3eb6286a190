"""``calib-guidance evaluate SAMPLES … --reference REF``: how good anybody's samples are, and what exactly was measured."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import check_writable
from calib_guidance.backend.distributed import DistributedContext, distributed_context
from calib_guidance.classifiers import Classifier, CLIPClassifier
from calib_guidance.data.base import listed
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.imagenet import read_class_names, same_classes
from calib_guidance.data.run_images import RunImages
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import features_from_name
from calib_guidance.evaluation.loading import read_classifier
from calib_guidance.evaluation.metrics import OPTIONS, select, select_applicable, unmet
from calib_guidance.evaluation.output import write_evaluation, write_summary
from calib_guidance.evaluation.quality import Quality, check_shape
from calib_guidance.evaluation.reference import (
    KINDS,
    add_measuring_options,
    add_reading_options,
    at_least_one,
    reading_options,
)
from calib_guidance.evaluation.spec import NO_FEATURES, Measures, MetricSpec, ReferenceHolds
from calib_guidance.evaluation.statistics import ReferenceStatistics, open_reference, versions

_OF_SAMPLES = ("split", "subset", "image_column", "label_column")  # which the two sets may have differently
_METRICS = "".join(f"  {option:<11}{words}\n" for option, words in OPTIONS.items())
_EXAMPLES = f"""
the reference may also be a file of statistics (.npz): of calib-guidance reference, of ADM's evaluator (mu, sigma, mu_s, sigma_s,
arr_0), or mu and sigma alone (EDM, clean-fid, pytorch-fid).

metrics:
{_METRICS}  MODULE.NAME a MetricSpec of your own
By default all that the features, the reference and the options allow, but is_adm and pr_adm.

examples:
  calib-guidance evaluate outputs/imagenet128/resnet101_js --reference VIRTUAL_imagenet128.npz --features inception
  calib-guidance evaluate outputs/experiments/digits/runs/*/js-relu/seed* \\
      --reference heldout.npz --features classifier:eval_classifier.yaml
  torchrun --nproc-per-node 8 -m calib_guidance evaluate samples.npz --reference /data/val --size 256 --features dinov2
"""


def read_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line after ``evaluate``; argparse's exit with status 2 where they are none."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance evaluate",
        description="How good samples are, against a reference: every metric with its uncertainty and its "
        "provenance. Several sets of samples, such as the same run with several seeds, also give mean ± standard deviation.",
        epilog=KINDS + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("samples", nargs="+", metavar="SAMPLES", help="the images, see below")
    parser.add_argument("--reference", required=True, metavar="REF", help="images, or statistics of them")
    add_measuring_options(parser, default="inception")
    parser.add_argument(
        "--metrics",
        metavar="NAME,…",
        help=f"of {','.join(OPTIONS)} (default: all that can be computed, see below)",
    )
    parser.add_argument(
        "--eval-classifier", metavar="CLASSIFIER.yaml", help="classifier that names the samples' classes"
    )
    parser.add_argument("--clip", metavar="CLIP.yaml", help="CLIPClassifier with a prompt for each class")
    parser.add_argument(
        "--extrapolate", action="store_true", help="also the Fréchet distance at infinitely many samples"
    )
    parser.add_argument(
        "--allow-few",
        action="store_true",
        help="Fréchet distances of no more samples than features, which compare only at the same number",
    )
    parser.add_argument(
        "--neighbors", type=at_least_one, default=3, metavar="K", help="of precision and recall (default: 3)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for metrics.json, metrics.md and predictions.npz (default: RUN/evaluation of a run folder, else "
        "outputs/evaluation/NAME). Of several sets, for their mean and a folder of each that is not a run folder (default: "
        "outputs/evaluation): what is measured of a run always stands in RUN/evaluation then, where report finds it",
    )
    add_reading_options(parser)
    own = parser.add_argument_group("reading samples, where they are tables that differ from the reference in this")
    for name in _OF_SAMPLES:
        own.add_argument(f"--samples-{name.replace('_', '-')}", metavar="NAME")
    return parser.parse_args(list(args))


def evaluate(args: Sequence[str]) -> None:
    """``calib-guidance evaluate``, of the arguments after ``evaluate``: see its ``--help``."""
    options = read_options(args)
    with distributed_context(options.device) as processes:
        _evaluate(options, processes)


def _evaluate(options: argparse.Namespace, processes: DistributedContext) -> None:
    shared = {name: value for name, value in reading_options(options).items() if name not in _OF_SAMPLES}
    own = {name: getattr(options, f"samples_{name}") for name in _OF_SAMPLES}
    sets = [ImageSet(source, **shared, **own) for source in options.samples]
    names, folders = _names(sets), _folders(options, sets)
    for folder in folders if len(sets) == 1 else (*folders, _output(options)):
        check_writable(folder, "--output")
    reference = open_reference(options.reference, **reading_options(options))
    if processes.is_first:
        images = [part for part in (*sets, reference) if isinstance(part, ImageSet)]
        print("\n".join(part.source.summary() for part in images))
    # All that can be refused is, before weights are downloaded and before the first image goes through a network.
    for samples in sets:
        check_shape(samples.name, samples.image_shape, reference.name, reference.image_shape)
    extractor = features_from_name(options.features)
    eval_classifier = None if options.eval_classifier is None else read_classifier(options.eval_classifier)
    clip = None if options.clip is None else read_classifier(options.clip)
    if clip is not None and not isinstance(clip, CLIPClassifier):
        raise ConfigurationError(f"--clip: {options.clip} describes {type(clip).__name__}, not CLIPClassifier")
    measures = Measures(extractor, eval_classifier, clip, options.neighbors, not options.allow_few, options.extrapolate)
    if isinstance(reference, ReferenceStatistics):
        reference.check(extractor)
    specs = _metrics(options.metrics, measures, ReferenceHolds.of(reference), sets)
    classifying = measures.extractor.classifier if measures.extractor_classifies else eval_classifier
    for samples in sets:
        _check_classes(samples, reference, classifying, {need for spec in specs for need in spec.needs})
    shapes = {samples.name: samples.image_shape for samples in sets}
    quality = Quality(specs, measures, reference, options.batch_size, processes, shapes)
    found = []
    for samples, folder in zip(sets, folders, strict=True):
        found.append(_measure(samples, quality, options))
        if processes.is_first:
            write_evaluation(folder, found[-1], quality)
    if processes.is_first and len(sets) > 1:
        write_summary(_output(options), names, found)


def _check_classes(
    samples: ImageSet, reference: ImageSet | ReferenceStatistics, classifier: Classifier | None, needs: Collection[str]
) -> None:
    """Raise ConfigurationError where metrics compare class numbers that mean other classes by their names."""
    own, others = samples.source.class_names, {}
    if "reference_labels" in needs and isinstance(reference, ImageSet):
        others[f"the reference {reference.name}"] = reference.source.class_names
    if "predictions" in needs and classifier is not None:
        others["the evaluation classifier"] = read_class_names(classifier.class_names, classifier.num_classes)
    for what, names in others.items():
        if not same_classes(own, names):
            raise ConfigurationError(
                f"{samples.name} numbers the classes {listed(own)}, {what} {listed(names)}: equal numbers must mean equal "
                "classes. Name class folders alike, with empty ones for classes without images, or name --metrics without classes"
            )


def _metrics(
    asked: str | None, measures: Measures, holds: ReferenceHolds, sets: Sequence[ImageSet]
) -> tuple[MetricSpec, ...]:
    """The metrics that are asked for, or all that apply to the sets."""
    names = None if asked is None else [name.strip() for name in asked.split(",")]
    specs = select_applicable(measures, holds) if names is None else select(names, measures.extractor)
    reasons: dict[str, str] = {}
    for samples in sets:
        for name, reason in unmet(specs, measures, holds, samples.num_images, samples.labelled).items():
            reasons[name] = f"{samples.name}: {reason}"
    # What too few samples do to a Fréchet distance is not left to a note among the others: it is the metric that is looked for.
    fatal = [f"{name} cannot be taken of {why}" for name, why in reasons.items() if names is not None or name == "fid"]
    if fatal:
        raise ConfigurationError("; ".join(fatal))
    return specs


def _measure(samples: ImageSet, quality: Quality, options: argparse.Namespace) -> dict[str, Any]:
    """The metrics of one set, on every process."""
    results = quality.measure(samples, progress=True)
    if options.metrics is None and quality.reference.features is None:
        results["notes"].append(f"kid, pr, dc and classwise skipped: {NO_FEATURES}")
    results["notes"] += samples.notes
    results["num_samples"] = results["num_measured"]
    results["provenance"]["versions"] = versions()
    return results


def _output(options: argparse.Namespace) -> Path:
    return options.output or Path("outputs/evaluation")


def _names(sets: Sequence[ImageSet]) -> list[str]:
    """A name for each set: as many of the last parts of its path as it takes to tell them apart."""
    paths = [Path(samples.name).expanduser().resolve().with_suffix("") for samples in sets]
    if len(set(paths)) != len(paths):
        raise ConfigurationError("evaluate: the same samples are named twice")
    words = 1
    while len({path.parts[-words:] for path in paths}) != len(paths):
        words += 1
    return ["-".join(path.parts[-words:]) for path in paths]


def _folders(options: argparse.Namespace, sets: Sequence[ImageSet]) -> list[Path]:
    """Where what is found of each set goes."""
    if len(sets) == 1 and options.output is not None:
        return [options.output]
    return [
        samples.source.run.path / "evaluation" if isinstance(samples.source, RunImages) else _output(options) / name
        for samples, name in zip(sets, _names(sets), strict=True)
    ]
