"""The commands ``calib-guidance evaluate SAMPLES … --reference REF`` and ``calib-guidance reference SOURCE --output FILE``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import check_writable
from calib_guidance.backend.choices import METRIC_OPTIONS, OF_SAMPLES
from calib_guidance.backend.distributed import DistributedContext, distributed_context
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers import CLIPClassifier
from calib_guidance.data.base import listed
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.imagenet import read_class_names, same_classes
from calib_guidance.data.source import RunImages
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.check import check_reference
from calib_guidance.evaluation.features import ClassifierFeatures, features_from_name, read_classifier
from calib_guidance.evaluation.metrics import select, unmet
from calib_guidance.evaluation.quality import Quality, described_statistics, write_evaluation, write_summary
from calib_guidance.evaluation.spec import NO_FEATURES, Measures, MetricSpec
from calib_guidance.evaluation.statistics import ReferenceStatistics, check_output, versions

_ASKED = ("is_adm", "pr_adm", "mind")  # conventions of others, which are measured where they are named
_READING = ("size", "resize", "mode", "max_corrupt", *OF_SAMPLES)


def reading(options: argparse.Namespace, samples: bool = False) -> dict[str, Any]:
    """Options of ``ImageSet``."""
    names = {name: f"samples_{name}" if samples and name in OF_SAMPLES else name for name in _READING}
    return {name: getattr(options, option) for name, option in names.items()}


def reference(options: argparse.Namespace) -> None:
    """``calib-guidance reference``, of the options that ``cli.measure_options`` reads."""
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


def evaluate(options: argparse.Namespace) -> None:
    """``calib-guidance evaluate``, of the options that ``cli.measure_options`` reads."""
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
    unused = [name for name in OF_SAMPLES if getattr(options, name) is not None]
    if unused and validation is None and ReferenceStatistics.holds(options.reference):
        option = unused[0].replace("_", "-")
        raise ConfigurationError(
            f"--{option} {getattr(options, unused[0])} is of the reference, but {options.reference} is a file of statistics, "
            f"which is read as it is. For the samples use --samples-{option}"
        )
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
        names = [name for name in METRIC_OPTIONS if name not in _ASKED and not (name == "is" and own_classes)]
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
