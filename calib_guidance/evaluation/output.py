"""Tables and files of measured sets of samples."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib_guidance.backend.atomic import atomic_write, write_text
from calib_guidance.errors import RunError
from calib_guidance.evaluation.metrics import METRICS, specs_of
from calib_guidance.evaluation.quality import Quality
from calib_guidance.evaluation.spec import MetricSpec
from calib_guidance.runs.store import REAL_IMAGES


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
    for name, key in (("classifier", "eval_classifier"), ("clip", "clip")):
        if key in provenance:
            lines.append(f"{name:<10} {provenance[key]['class']}; weights {provenance[key]['weights_sha256'][:12]}")
    for key, spec in METRICS.items():
        values = [(of_class[key], label) for label, of_class in results.get("by_class", {}).items() if key in of_class]
        if values and spec.limits == (0.0, 1.0):
            (least, worst), (most, best) = min(values), max(values)
            named = f"{least:.3f} (class {worst}) … {most:.3f} (class {best}), {len(values)} classes"
            lines.append(f"by class   {spec.label} {named}")
    return lines + described_uncertainty(results) + [f"note       {note}" for note in results["notes"]]


def described_uncertainty(results: Mapping[str, Any]) -> list[str]:
    """What each ± is the standard deviation over: a line for each kind."""
    return [f"±          {', '.join(labels)}: {of}" for of, labels in uncertainty_sources(results).items()]


def uncertainty_sources(*measured: Mapping[str, Any]) -> dict[str, list[str]]:
    """Labels of the metrics, by what their uncertainty is over, of contents of ``metrics.json``."""
    specs, sources = specs_of(*measured), {}
    for results in measured:
        for key, each in results.get("uncertainty", {}).items():
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
    words = ["an unknown number of images" if count is None else f"{count:,} images"]
    if "source" in images:
        channels, *size = images["image_shape"]
        words[0] += f" of {images['source']} ({images['kind']})"
        words.append(f"{'×'.join(map(str, size))} {'gray' if channels == 1 else 'RGB'}")
        words += [images["preprocessing"]["how"]] if images.get("preprocessing") else []
        words += [f"uint8 rule {images['uint8_rule']}"] if images.get("uint8_rule") else []
        words += [f"sha256 {images['sha256'][:digits]}"] if images.get("sha256") else []
        words += [f"{images['num_skipped']} skipped: {', '.join(images['skipped'])}"] if images["num_skipped"] else []
    return "; ".join(words)


def _write(folder: Path, results: Mapping[str, Any], table: Sequence[str], lines: Sequence[str]) -> None:
    write_json(folder / "metrics.json", results)
    write_text(folder / "metrics.md", "\n".join([*table, "", *(f"- {line}" for line in lines), ""]))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. The values above are complete; free "
            "disk space, or name another --output, and re-run to have them in files"
        ) from error


def write_evaluation(folder: Path, results: Mapping[str, Any], quality: Quality) -> None:
    """Print the table of one set, and write ``metrics.json``, ``metrics.md``, and what :func:`write_arrays` does."""
    lines = described(results)
    print(f"\n{results['num_samples']:,} samples of {results['provenance']['samples']['source']}")
    print(printed_table(results), *lines, sep="\n")
    cells = [f"| {label} | {value} | {std.removeprefix('± ')} |" for label, value, std in table_rows(results)]
    with _writing(folder):
        _write(folder, results, ["| | | ± |", "|---|---:|---:|", *cells], lines)
        arrays = write_arrays(folder, quality)
    print(f"wrote {folder / 'metrics.json'}, {', '.join(['metrics.md', *arrays])}")


def write_summary(folder: Path, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Print and write mean and standard deviation over sets, with a line for each set."""
    specs = {
        key: spec
        for key, spec in specs_of(*found).items()
        if all(isinstance(results.get(key), int | float) for results in found)
    }
    mean = {key: statistics.mean(results[key] for results in found) for key in specs}
    std = {key: statistics.stdev(results[key] for results in found) for key in specs}
    of, unlimited = f"{len(found)} runs", MetricSpec("", "", limits=(-math.inf, math.inf))
    rows = [["samples", *(spec.label for spec in specs.values())], ["---", *["---:"] * len(specs)]]
    for name, results in zip(names, found, strict=True):
        rows.append([name, *(spec.format.format(results[key]) for key, spec in specs.items())])
    both = (f"{spec.format.format(mean[key])} ± {spec.format.format(std[key])}" for key, spec in specs.items())
    rows.append(["**mean ± std**", *both])
    table = [f"| {' | '.join(row)} |" for row in rows]
    counts = sorted({results["num_measured"] for results in found})
    notes = [f"± is the standard deviation over {len(found)} runs"]
    if len(counts) > 1:
        listed = ", ".join(f"{count:,}" for count in counts)
        notes.append(f"{listed} samples: Fréchet distances of different numbers of samples do not compare")
    # What all have in common; their own uncertainties and what they say of their own samples stand with each.
    shared = [line for line in described(found[0]) if all(line in described(results) for results in found[1:])]
    notes += [line for line in shared if not line.startswith(("samples ", "±", "by class"))]
    print("", *table, *notes, sep="\n")
    uncertainty = {key: unlimited.uncertainty(mean[key], std[key], of) for key in specs}
    content = {**mean, "uncertainty": uncertainty, "notes": notes, "runs": dict(zip(names, found, strict=True))}
    with _writing(folder):
        _write(folder, content, table, notes)
    print(f"wrote {folder / 'metrics.json'}, metrics.md")


def write_arrays(folder: Path, quality: Quality) -> list[str]:
    """Write :meth:`Quality.predictions` and :meth:`Quality.real_images`, and remove those of an earlier evaluation.

    Returns:
        Names of the files.
    """
    found = {"predictions.npz": quality.predictions(), REAL_IMAGES: quality.real_images()}
    for name, arrays in found.items():
        if arrays is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_write(folder / name) as file:
                np.savez_compressed(file, **arrays)
    return [name for name, arrays in found.items() if arrays is not None]


def plain(value: Any) -> Any:
    """Mappings, lists and numbers as JSON has them: NaN and infinities as null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, see :func:`plain`."""
    write_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")
