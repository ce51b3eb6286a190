"""FDr-6 (FD-loss, arXiv 2604.28190): the Fréchet distance in units of real validation images', mean over six encoders."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.atomic import write_text
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import ENCODERS
from calib_guidance.evaluation.metrics import validation_distance
from calib_guidance.evaluation.quality import Quality, described, write_json
from calib_guidance.evaluation.statistics import ReferenceStatistics

FDR6 = "fdr6"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def is_fdr6(features: str) -> bool:
    """Whether ``--features`` names the six encoders."""
    return features.partition(":")[0] == FDR6


def features_of(features: str) -> dict[str, str]:
    """``--features`` of each encoder; the folder of ``fdr6:FOLDER`` has a file of weights of each."""
    folder = features.partition(":")[2]
    if not folder:
        return {name: f"fdr:{name}" for name in ENCODERS}
    found = {}
    for name in ENCODERS:
        files = [Path(folder) / f"{name}{ending}" for ending in _ENDINGS]
        there = [file for file in files if file.is_file()]
        if not there:
            raise ConfigurationError(
                f"--features {features}: no weights {files[0]}; expected a file of each of {', '.join(ENCODERS)}, with the "
                f"ending {', '.join(_ENDINGS)}"
            )
        found[name] = f"fdr:{name}:{there[0]}"
    return found


def statistics_of(option: str, source: str) -> dict[str, str]:
    """The file of each encoder in a folder that ``reference --features fdr6`` wrote; images are of every encoder."""
    files = {name: Path(source).expanduser() / f"{name}.npz" for name in ENCODERS}
    missing = [file.name for file in files.values() if not file.is_file()]
    if len(missing) == len(files):
        if ReferenceStatistics.holds(source):
            raise ConfigurationError(
                f"{option} {source}: statistics of one extractor. FDr-6 needs images, or the folder that calib-guidance "
                "reference --features fdr6 writes"
            )
        return dict.fromkeys(ENCODERS, source)
    if missing:
        raise ConfigurationError(
            f"{option} {source}: no {', '.join(missing)}; re-run calib-guidance reference --features fdr6 to make what is missing"
        )
    return {name: str(file) for name, file in files.items()}


def check_kept(file: Path, images: ImageSet) -> None:
    """Raise ConfigurationError for an existing file of statistics whose images were others, as far as one can tell unread."""
    made, now = ReferenceStatistics.read(file).provenance.get("images", {}), images.provenance()
    for key in ("source", "num_images", "image_shape", "preprocessing", "mode"):
        if made.get(key) != now[key]:
            raise ConfigurationError(
                f"{file} is there already, of other images ({key} {made.get(key)}, now {now[key]}): remove it, or name another "
                "--output"
            )


def check_options(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for options of ``evaluate`` that FDr-6, which is of Fréchet distances alone, does not use."""
    for name in ("metrics", "eval_classifier", "clip", "extrapolate"):
        if getattr(options, name):
            raise ConfigurationError(
                f"--{name.replace('_', '-')}: --features {FDR6} measures Fréchet distances alone; evaluate again with "
                "--features inception for other metrics"
            )


def encoder_results(name: str, quality: Quality, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What one encoder says of a set, of the content of its ``metrics.json``: distance, units and ratios."""
    key = "fid" if name == "inception" else "fd"
    found = {"fd": measured[key], "published_unit": ENCODERS[name].unit}
    found["fdr_published"] = found["fd"] / found["published_unit"]
    if (held := quality.measures.validation) is not None:
        found["unit"] = float(validation_distance(quality.reference, held))
        found["fdr"] = found["fd"] / found["unit"]
    if std := measured["uncertainty"].get(key, {}).get("std"):
        found["fd_std"] = std
    return found | {"features": measured["provenance"]["features"]}


def combined(encoders: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``fdr6.json`` of a set: means over encoders, and each; ``measured`` is of the last encoder."""
    names = {"fdr6": "fdr", "fdr6_published": "fdr_published"}
    means = {
        key: statistics.mean(each[of] for each in encoders.values())
        for key, of in names.items()
        if all(of in each for each in encoders.values())
    }
    kept = {key: measured[key] for key in ("num_measured", "num_reference", "protocol")}
    sources = {key: measured["provenance"][key] for key in ("samples", "reference")}
    notes = ["published units are those of 50,000 ImageNet validation images to training statistics at 256 pixels"]
    notes.append("MAE's unit, 0.04, is published with one digit: ± 12 % of its term")
    if "fdr6" not in means:
        notes.append(
            "without --validation there is no unit of this reference: fdr6_published is of ImageNet at 256 alone"
        )
    return {**means, "encoders": dict(encoders), **kept, "notes": notes, "provenance": sources}


def table(results: Mapping[str, Any]) -> list[str]:
    """A row for each encoder and one of the means, in Markdown."""
    own = "fdr6" in results
    titles = [
        "encoder",
        "FD ↓",
        *(["FD of validation images", "FDr ↓"] if own else []),
        "FD-loss's unit",
        "FD / that ↓",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, each in results["encoders"].items():
        distance = f"{each['fd']:.4g}" + (f" ± {each['fd_std']:.2g}" if "fd_std" in each else "")
        cells = [name, distance, *([f"{each['unit']:.4g}", f"{each['fdr']:.3f}"] if own else [])]
        cells += [f"{each['published_unit']:g}", f"{each['fdr_published']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    cells = [
        "**FDr-6**",
        "",
        *(["", f"**{results['fdr6']:.3f}**"] if own else []),
        "",
        f"{results['fdr6_published']:.3f}",
    ]
    return [*lines, f"| {' | '.join(cells)} |"]


def write(folder: Path, results: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print and write ``fdr6.json`` and ``fdr6.md``."""
    text = [*table(results), "", *(f"- {line}" for line in [*lines, *results["notes"]])]
    print("", *text, sep="\n")
    write_json(folder / "fdr6.json", results)
    write_text(folder / "fdr6.md", "\n".join([*text, ""]))
    print(f"wrote {folder / 'fdr6.json'}, fdr6.md")


def write_summary(folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print and write ``fdr6.json`` and ``fdr6.md`` of several sets: mean ± standard deviation over them, and each."""
    found, lines = {}, ["| over sets | mean ± std |", "|---|---:|"]
    for key, label in (("fdr6", "FDr-6 ↓"), ("fdr6_published", "FDr-6 by FD-loss's units ↓")):
        values = [results[key] for results in runs.values() if key in results]
        if values:
            found[key] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
            lines.append(f"| {label} | {found[key]['mean']:.3f} ± {found[key]['std']:.3f} |")
    print("", *lines, sep="\n")
    write_json(folder / "fdr6.json", found | {"runs": dict(runs)})
    write_text(folder / "fdr6.md", "\n".join([*lines, ""]))
    print(f"wrote {folder / 'fdr6.json'}, fdr6.md")


def source_lines(measured: Mapping[str, Any]) -> list[str]:
    """What samples and reference are: of the lines that ``evaluate`` prints."""
    return [line for line in described(measured) if line.startswith(("samples ", "reference ", "protocol "))]
