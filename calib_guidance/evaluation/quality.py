"""Measuring sets of samples against one reference, and the tables and files of what is measured."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calib_guidance.backend.atomic import atomic_write, write_text
from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import from_uint8
from calib_guidance.data.image_sets import ImageBatch, ImageSet
from calib_guidance.data.source import RunImages
from calib_guidance.errors import ConfigurationError, RunError
from calib_guidance.evaluation.metrics import METRICS, specs_of, unmet
from calib_guidance.evaluation.spec import Estimate, Measures, MetricSpec, SampleSet
from calib_guidance.evaluation.statistics import ReferenceStatistics, gather_in_order
from calib_guidance.metrics.frechet import sample_count_note
from calib_guidance.metrics.paired import samples_to_resolve
from calib_guidance.runs import read_run, requested
from calib_guidance.runs.identity import hash_state
from calib_guidance.runs.store import REAL_IMAGES

_BEST_OF = ("fid", "fd_dinov2", "fd_clip", "fd", "sfid")  # papers publish the best of several seeds


class Quality:
    """Measures sets of samples against one reference.

    ``measures`` are moved to the device of the process; their networks must be able to take the ``shapes`` ``(C, H, W)``.
    """

    def __init__(
        self,
        specs: Sequence[MetricSpec],
        measures: Measures,
        reference: ReferenceStatistics,
        batch_size: int,
        processes: DistributedContext,
        shapes: Iterable[tuple[int, int, int]],
    ):
        self.specs, self.batch_size, self.processes = specs, batch_size, processes
        self._provenance: dict[str, Any] = {"features": measures.extractor.provenance()}
        for name, classifier in (("eval_classifier", measures.eval_classifier), ("clip", measures.clip)):
            if classifier is not None:  # its hash before it is frozen, which may fold weights into others
                known = {"class": type(classifier).__name__, "weights_sha256": hash_state(classifier)}
                self._provenance[name] = getattr(classifier, "provenance", {}) | known
        self.measures = measures.to(processes.device)
        for shape in dict.fromkeys(shapes):
            measures.check(shape, processes.device)
        needs = {need for spec in specs for need in spec.needs}
        kept, spatial = "reference_features" in needs, "spatial" in needs
        options = {"batch_size": batch_size, "keep_features": kept, "spatial": spatial, "processes": processes}
        self.reference = reference.measured(measures.extractor, **options).to(processes.device)
        self._provenance["reference"] = self.reference.provenance

    @torch.no_grad()
    def measure(self, images: ImageSet, progress: bool = False) -> dict[str, Any]:
        """The content of ``metrics.json``; the same on all processes. All must call it. The first shows ``progress``.

        Values and ``uncertainty`` by key (see :meth:`MetricSpec.uncertainty`), ``by_class``, ``notes``, ``provenance``, counts,
        and ``own_metrics`` that are not in the table.
        """
        processes, rows = self.processes, []
        reasons = unmet(self.specs, self.measures, self.reference, images)
        specs = [spec for spec in self.specs if spec.option not in reasons]
        self._needs = {need for spec in specs for need in spec.needs}
        hidden = not (progress and processes.is_first)
        with tqdm(total=images.num_images, desc=images.name, unit="image", leave=False, disable=hidden) as bar:
            for batch in images.batches(self.batch_size, processes.rank, processes.world_size):
                rows.append(self._rows(batch))
                bar.update(len(batch.index) * processes.world_size)
        images.gather(processes)
        rows = {name: value.to(processes.device) for name, value in gather_in_order(rows, processes).items()}
        notes = [f"{option} skipped: {reason}" for option, reason in reasons.items()]
        self.samples = samples = SampleSet(self.measures, self.reference, rows, notes, processes=processes)
        found: dict[str, Any] = {"uncertainty": {}}
        for spec in specs:
            value = spec.compute(samples)
            if isinstance(value, Mapping):
                found[spec.key] = value
            elif value is not None:
                estimate = value if isinstance(value, Estimate) else Estimate(value)
                found[spec.key] = float(estimate.value)
                if math.isfinite(estimate.std):
                    found["uncertainty"][spec.key] = spec.uncertainty(*estimate)
            if spec.key not in METRICS:
                own = {name: getattr(spec, name) for name in ("label", "format", "higher_is_better")}
                found.setdefault("own_metrics", {})[spec.key] = own
        return {
            **found,
            "notes": [*samples.notes, *self.reference.notes],
            "features": self.measures.extractor.name,
            "num_measured": samples.num_samples,
            "num_reference": self.reference.num_images,
            "protocol": _protocol(images, samples.labels),
            "provenance": self._provenance | {"samples": images.provenance()},
        }

    def _rows(self, batch: ImageBatch) -> dict[str, Tensor]:
        """What is kept of a batch, see :class:`SampleSet`."""
        images, labels = (value.to(self.processes.device) for value in (batch.image, batch.label))
        pool, spatial, logits = self.measures.extractor(images)
        rows = {"index": batch.index.to(labels), "label": labels}
        for name, value in (("features", pool), ("spatial", spatial), ("logits", logits)):
            if name in self._needs:
                rows[name] = value.float()
        if "predictions" in self._needs:
            if self.measures.eval_classifier is not None:
                logits = self.measures.eval_classifier(from_uint8(images))
            p = logits.double().softmax(1)
            rows["of_label"] = _of_label(p, labels, "the evaluation classifier")
            rows["confidence"], rows["predicted"] = p.max(1)
        if "similarity" in self._needs:
            rows["similarity"] = _of_label(self.measures.similarity(images).float(), labels, "the CLIP model")
        return rows


def _protocol(images: ImageSet, labels: Tensor) -> str:
    """How labels and noise of the samples were drawn, as far as that is known."""
    counts = labels[labels >= 0].unique(return_counts=True)[1].tolist()
    if not counts:
        drawn = "labels not known"
    else:
        low, high = min(counts), max(counts)
        drawn = f"labels balanced ({low:,}" if high - low <= 1 else f"labels not balanced ({low:,} to {high:,}"
        drawn += f" of each of {len(counts):,} classes)"
    run = read_run(images.source.run.path) if isinstance(images.source, RunImages) else None
    seed = requested(run, "seed") if run else None
    return f"{drawn}; seed {'not known' if seed is None else seed}, one set of samples"


def _of_label(values: Tensor, labels: Tensor, whose: str) -> Tensor:
    """Of values ``(N, K)`` those of the labels, ``(N,)``."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < values.shape[1]:
        classes = f"{int(labels.min())} … {int(labels.max())}"
        raise ConfigurationError(f"the samples are of classes {classes}, {whose} knows {values.shape[1]}, from 0 on")
    return values.gather(1, labels[:, None]).squeeze(1)


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and ± standard deviation of every metric of ``metrics.json``, as text; no deviation where it is not known."""
    rows = []
    for key, spec in specs_of(results).items():
        if isinstance(value := results.get(key), int | float):
            found = results.get("uncertainty", {}).get(key)
            rows.append((spec.label, spec.text(value), f"± {spec.format.format(found['std'])}" if found else ""))
    return rows


def printed_table(results: Mapping[str, Any]) -> str:
    """:func:`table_rows` in aligned columns."""
    rows = table_rows(results)
    wide = max(len(label) for label, _, _ in rows)
    return "\n".join(f"  {label:<{wide}}  {value:>8}  {std}".rstrip() for label, value, std in rows)


def described(results: Mapping[str, Any]) -> list[str]:
    """What was measured and with what, what each ± is over, and the notes: a line each."""
    provenance = results["provenance"]
    lines = [
        f"features   {described_features(provenance['features'])}",
        f"samples    {described_images(provenance['samples'], results['num_measured'])}",
        f"reference  {described_images(provenance['reference'].get('images', {}), results['num_reference'])}",
    ]
    if "file" in provenance["reference"]:
        lines[-1] += f"; from {provenance['reference']['file']} ({provenance['reference']['sha256'][:12]})"
    if "protocol" in results:
        lines.append(f"protocol   {results['protocol']}")
    for name, key in (("classifier", "eval_classifier"), ("clip", "clip")):
        if key in provenance:
            lines.append(f"{name:<10} {provenance[key]['class']}; weights {provenance[key]['weights_sha256'][:12]}")
    for key, spec in METRICS.items():
        values = [(of_class[key], label) for label, of_class in results.get("by_class", {}).items() if key in of_class]
        if values and spec.limits == (0.0, 1.0):
            (least, worst), (most, best) = min(values), max(values)
            named = f"{least:.3f} (class {worst}) … {most:.3f} (class {best}), {len(values)} classes"
            lines.append(f"by class   {spec.label} {named}")
    return lines + described_uncertainty(results) + _cost(results) + [f"note       {note}" for note in results["notes"]]


def _cost(results: Mapping[str, Any]) -> list[str]:
    """How many samples a difference of 5 % takes, of the first distance that has a standard error."""
    for key in _BEST_OF:
        value, std = results.get(key), results.get("uncertainty", {}).get(key, {}).get("std")
        if isinstance(value, float) and value > 0 and std:
            count = samples_to_resolve(value, std, results["num_measured"])
            about = f"about {float(f'{count:.2g}'):,.0f} samples each to tell a difference of 5 % from noise"
            label, fewer = METRICS[key].label, "runs of common noise need fewer (calib-guidance compare-runs)"
            return [f"cost       {label}: two independent runs need {about}; {fewer}"]
    return []


def described_uncertainty(results: Mapping[str, Any]) -> list[str]:
    """What each ± is the standard deviation over: a line for each kind."""
    return [f"±          {', '.join(labels)}: {of}" for of, labels in uncertainty_sources(results).items()]


def uncertainty_sources(*measured: Mapping[str, Any]) -> dict[str, list[str]]:
    """Labels of the metrics, by what their uncertainty is over, of contents of ``metrics.json``."""
    specs, sources = specs_of(*measured), {}
    for key, each in (item for results in measured for item in results.get("uncertainty", {}).items()):
        if isinstance(each, Mapping) and each.get("of"):
            label = specs[key].label if key in specs else key.replace("_", " ")
            sources.setdefault(str(each["of"]), {})[label] = None
    return {of: list(labels) for of, labels in sources.items()}


def described_features(features: Mapping[str, Any], digits: int = 12) -> str:
    """The provenance of features in a line, with so many digits of hashes."""
    resize, weights = features["resize"], features["weights_sha256"][:digits]
    size = f"resized to {resize['size']} ({resize['how']}; {resize['library']})" if resize["size"] else "not resized"
    return f"{features['extractor']}; {features['library']}; weights {weights}; {size}"


def described_images(images: Mapping[str, Any], count: int | None, digits: int = 12) -> str:
    """The provenance of ``count`` images in a line, with so many digits of hashes."""
    counted = "an unknown number of images" if count is None else f"{count:,} images"
    if "source" not in images:
        return counted
    channels, *size = images["image_shape"]
    words = [
        f"{counted} of {images['source']} ({images['kind']})",
        f"{'×'.join(map(str, size))} {'gray' if channels == 1 else 'RGB'}",
        images["preprocessing"]["how"] if images.get("preprocessing") else "",
        f"uint8 rule {images['uint8_rule']}" if images.get("uint8_rule") else "",
        f"sha256 {images['sha256'][:digits]}" if images.get("sha256") else "",
        f"{images['num_skipped']} skipped: {', '.join(images['skipped'])}" if images["num_skipped"] else "",
    ]
    return "; ".join(filter(None, words))


def described_statistics(made: ReferenceStatistics) -> list[str]:
    """What was made of what, for people."""
    images = made.provenance["images"]
    lines = [
        f"images      {described_images(images, made.num_images, 64)}; {images['decoder']}",
        *(f"            {count:,}: {name}" for name, count in images["conversions"].items()),
        f"features    {described_features(made.provenance['features'], 64)}",
    ]
    widths = [f"mu, sigma of {len(made.mean)} features"]
    if made.spatial_mean is not None:
        widths.append(f"mu_s, sigma_s of {len(made.spatial_mean)} spatial ones")
    if made.features is not None:
        kept = "with labels" if made.labels is not None else "without labels, which are not known"
        widths.append(f"the features of {len(made.features):,} images ({kept})")
    lines.append(f"holds       {'; '.join(widths)}")
    note = sample_count_note(made.num_images, len(made.mean))
    return lines + ([f"note        {note}"] if note else [])


def _write(
    folder: Path, results: Mapping[str, Any], table: Sequence[str], lines: Sequence[str], quality: Quality | None
) -> None:
    """Write ``metrics.json``, ``metrics.md``, and what :func:`write_arrays` does, and say so."""
    try:
        write_json(folder / "metrics.json", results)
        write_text(folder / "metrics.md", "\n".join([*table, "", *(f"- {line}" for line in lines), ""]))
        arrays = write_arrays(folder, quality) if quality else []
    except OSError as error:
        raise RunError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. The values above are complete; free "
            "disk space, or name another --output, and re-run to have them in files"
        ) from error
    print(f"wrote {folder / 'metrics.json'}, {', '.join(['metrics.md', *arrays])}")


def write_evaluation(folder: Path, results: Mapping[str, Any], quality: Quality) -> None:
    """Print and write the table of one set."""
    lines = described(results)
    print(f"\n{results['num_samples']:,} samples of {results['provenance']['samples']['source']}")
    print(printed_table(results), *lines, sep="\n")
    cells = [f"| {label} | {value} | {std.removeprefix('± ')} |" for label, value, std in table_rows(results)]
    _write(folder, results, ["| | | ± |", "|---|---:|---:|", *cells], lines, quality)


def write_summary(folder: Path, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Print and write mean and standard deviation over sets, with a line for each set."""
    best: dict[str, float] = {}
    unlimited, rows = MetricSpec("", "", limits=(-math.inf, math.inf)), [["samples", "---", *names, "**mean ± std**"]]
    content: dict[str, Any] = {"uncertainty": {}}
    for key, spec in specs_of(*found).items():
        values = [results.get(key) for results in found]
        if all(isinstance(value, int | float) for value in values):
            mean, std = statistics.mean(values), statistics.stdev(values)
            cells = [*map(spec.format.format, values), f"{spec.format.format(mean)} ± {spec.format.format(std)}"]
            rows.append([spec.label, "---:", *cells])
            if spec.higher_is_better is not None:
                best[key] = (max if spec.higher_is_better else min)(values)
            content[key], content["uncertainty"][key] = mean, unlimited.uncertainty(mean, std, f"{len(found)} runs")
    table = [f"| {' | '.join(row)} |" for row in zip(*rows, strict=True)]
    specs = specs_of(*found)
    named = ", ".join(f"{specs[key].label} {specs[key].text(value)}" for key, value in best.items() if key in _BEST_OF)
    counts = sorted({results["num_measured"] for results in found})
    notes = [f"± is the standard deviation over {len(found)} runs"]
    if named:
        words = "the convention of EDM and EDM2, with three, which lies below a mean"
        notes.append(f"best of {len(found)} seeds ({words}): {named}")
    if len(counts) > 1:
        listed = ", ".join(f"{count:,}" for count in counts)
        notes.append(f"{listed} samples: Fréchet distances of different numbers of samples do not compare")
    # What all have in common; their own uncertainties and what they say of their own samples stand with each.
    shared = [line for line in described(found[0]) if all(line in described(results) for results in found[1:])]
    notes += [line for line in shared if not line.startswith(("samples ", "protocol ", "±", "by class"))]
    print("", *table, *notes, sep="\n")
    content |= {"best": best, "notes": notes, "runs": dict(zip(names, found, strict=True))}
    _write(folder, content, table, notes, None)


def write_arrays(folder: Path, quality: Quality) -> list[str]:
    """Write arrays of the last set, remove those of an earlier evaluation, and name the files.

    ``predictions.npz``, of an evaluation classifier: ``index``, ``label``, ``predicted`` int64 and ``confidence`` float32, the
    probability that it gives the sample's class. And reference images for a report, see :func:`_real_images`.
    """
    rows, predictions = quality.samples.rows, None
    if "predicted" in rows:
        predictions = {name: rows[name].cpu().numpy() for name in ("index", "label", "predicted")}
        predictions["confidence"] = rows["of_label"].float().cpu().numpy()
    real = _real_images(quality.reference.images, rows["label"].tolist())
    found = {"predictions.npz": predictions, REAL_IMAGES: real}
    for name, arrays in found.items():
        if arrays is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_write(folder / name) as file:
                np.savez_compressed(file, **arrays)
    return [name for name, arrays in found.items() if arrays is not None]


def _real_images(images: ImageSet | None, labels: list[int]) -> dict[str, np.ndarray] | None:
    """Ten images ``(N, C, H, W)`` of each of the first ten classes, about 8 MB at most, with label and name of the class."""
    chosen = [label for label in dict.fromkeys(labels) if label >= 0][:10]
    if images is None or not images.labelled or not chosen:
        return None
    count = max(1, min(10, 2**23 // (len(chosen) * math.prod(images.image_shape))))
    found = [(label, each) for label, some in images.examples(chosen, count).items() for each in some]
    if not found:
        return None
    label, image = zip(*found, strict=True)
    names = images.source.class_names
    name = ["" if names is None else names[each] for each in label]
    return {"label": np.array(label), "name": np.array(name), "image": np.stack(image)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, NaN and infinities as null."""
    write_text(path, json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")
