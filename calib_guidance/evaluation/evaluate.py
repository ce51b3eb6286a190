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
from calib_guidance.evaluation import fdr6
from calib_guidance.evaluation.check import check_reference
from calib_guidance.evaluation.features import ClassifierFeatures
from calib_guidance.evaluation.metrics import select, unmet
from calib_guidance.evaluation.named import features_from_name, read_classifier
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
    if fdr6.is_fdr6(options.features):
        _reference_of_each(options)
        return
    if options.check is not None:
        with distributed_context(options.device) as processes:
            extractor = features_from_name(options.features)
            check_reference(options.check, options.source, reading(options), extractor, options.batch_size, processes)
        return
    check_output(options.output)
    with distributed_context(options.device) as processes:
        _make_reference(options, processes)


def _make_reference(options: argparse.Namespace, processes: DistributedContext) -> None:
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


def _reference_of_each(options: argparse.Namespace) -> None:
    """A file of each encoder of FDr-6 in the folder ``output``; those that are there are kept."""
    if options.check is not None or options.output.suffix:
        given = f"--check {options.check}" if options.check is not None else f"--output {options.output}"
        raise ConfigurationError(f"{given}: with --features fdr6 --output is a folder, of a file for each encoder")
    check_writable(options.output, "--output")
    with distributed_context(options.device) as processes:
        for name, features in fdr6.features_of(options.features).items():
            output = options.output / f"{name}.npz"
            there = processes.gather(output.exists())[0]  # all go the same way
            if not there:
                _make_reference(_with(options, features=features, output=output), processes)
            else:
                fdr6.check_kept(output, ImageSet(options.source, **reading(options)))
                if processes.is_first:
                    print(f"{output} is there already: kept")


def _with(options: argparse.Namespace, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | others)


def evaluate(options: argparse.Namespace) -> None:
    """``calib-guidance evaluate``, of the options that ``cli.measure_options`` reads."""
    with distributed_context(options.device) as processes:
        (_evaluate_each if fdr6.is_fdr6(options.features) else _evaluate)(options, processes)


def _places(options: argparse.Namespace, sets: Sequence[ImageSet]) -> tuple[Path, list[str], list[Path]]:
    """Folder of what is of several sets, their names, and a folder for each; all can be written to."""
    together = options.output or Path("outputs/evaluation")
    names = _names(sets)
    folders = [options.output]
    if len(sets) > 1 or options.output is None:
        sources = [samples.source for samples in sets]
        runs = (source.run.path / "evaluation" if isinstance(source, RunImages) else None for source in sources)
        folders = [run or together / name for run, name in zip(runs, names, strict=True)]
    for folder in folders if len(sets) == 1 else (*folders, together):
        check_writable(folder, "--output")
    return together, names, folders


def _evaluate(options: argparse.Namespace, processes: DistributedContext) -> None:
    sets = [ImageSet(source, **reading(options, samples=True)) for source in options.samples]
    together, names, folders = _places(options, sets)
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


def _evaluate_each(options: argparse.Namespace, processes: DistributedContext) -> None:
    """FDr-6: one encoder after the other, of every set."""
    fdr6.check_options(options)
    features = fdr6.features_of(options.features)
    references = fdr6.statistics_of("--reference", options.reference)
    held = fdr6.statistics_of("--validation", options.validation) if options.validation else {}
    found: list[dict[str, dict[str, Any]]] = [{} for _ in options.samples]
    for name in features:
        own = _with(options, features=features[name], reference=references[name], metrics="fid")
        sets = [ImageSet(source, **reading(options, samples=True)) for source in options.samples]
        together, names, folders = _places(options, sets)
        if processes.is_first:
            print(f"encoder {name}, {len(found[0]) + 1} of {len(features)}")
        quality = open_quality(own, sets, processes, validation=held.get(name), announce=not found[0])
        measured = [quality.measure(samples, progress=True) for samples in sets]
        for each, results in zip(found, measured, strict=True):
            each[name] = fdr6.encoder_results(name, quality, results)
    results = [fdr6.combined(each, last) for each, last in zip(found, measured, strict=True)]
    if processes.is_first:
        for each, last, folder in zip(results, measured, folders, strict=True):
            fdr6.write(folder, each, fdr6.source_lines(last))
        if len(sets) > 1:
            fdr6.write_summary(together, dict(zip(names, results, strict=True)))


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
    announce: bool = True,
) -> Quality:
    """What measures the sets, checked against them before the first image goes through a network; ``announce`` prints sources."""
    unused = [name for name in OF_SAMPLES if getattr(options, name) is not None]
    if unused and validation is None and ReferenceStatistics.holds(options.reference):
        option = unused[0].replace("_", "-")
        raise ConfigurationError(
            f"--{option} {getattr(options, unused[0])} is of the reference, but {options.reference} is a file of statistics, "
            f"which is read as it is. For the samples use --samples-{option}"
        )
    reference = ReferenceStatistics.open(options.reference, **reading(options))
    if processes.is_first and announce:
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
