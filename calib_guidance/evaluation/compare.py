"""The command ``calib-guidance compare-runs A B --reference REF``: is one run better than another, or is it the noise?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calib_guidance.backend.atomic import check_writable, write_text
from calib_guidance.backend.distributed import DistributedContext, distributed_context
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.source import RunImages
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.evaluate import (
    open_quality,
    reading,
)
from calib_guidance.evaluation.quality import Quality, described, write_json
from calib_guidance.evaluation.spec import Estimate, MetricSpec, SampleSet
from calib_guidance.evaluation.statistics import versions
from calib_guidance.metrics.paired import (
    PairedDifference,
    jackknife_blocks,
    mean_difference,
    paired_difference,
    sign_test,
)
from calib_guidance.runs import read_run, requested

_UNBIASED = ("fid", "sfid")  # options whose metrics have a bias of 1/N, which the jackknife removes


def compare_runs(options: argparse.Namespace) -> None:
    """``calib-guidance compare-runs``, of the options that ``cli.measure_options`` reads."""
    with distributed_context(options.device) as processes:
        _compare(options, processes)


def _compare(options: argparse.Namespace, processes: DistributedContext) -> None:
    check_writable(options.output, "--output")
    names = [pair for given in ((options.a, options.b), *options.pair) for pair in _by_seed(*given)]
    pairs = [tuple(ImageSet(name, **reading(options, samples=True)) for name in pair) for pair in names]
    known = [_check_pair(a, b) for a, b in pairs]
    quality = open_quality(options, [images for pair in pairs for images in pair], processes)
    found = [_pair_differences(quality, *pair, options.blocks) for pair in pairs]
    if not found[0].rows:
        raise ConfigurationError("no metric of these runs has a paired error: name --metrics fid, pr, dc or classifier")
    notes = [*dict.fromkeys(note for each in found for note in each.notes)]
    if not all(known):
        notes.append("not all sets are run folders: that they share noise and labels is your word")
    content = _content(found, options.blocks) | {
        "pairs": names,
        "blocks": options.blocks,
        "notes": notes,
        "provenance": found[0].provenance | {"versions": versions()},
    }
    if processes.is_first:
        _write(options.output, content)


def _by_seed(a: str, b: str) -> list[tuple[str, str]]:
    """The pair; or of two rows of an experiment, folders with ``seed0``, ``seed1`` … in them, a pair for each seed of both."""
    rows = [{path.name: str(path) for path in Path(name).glob("seed*")} for name in (a, b)]
    if not all(rows):
        return [(a, b)]
    if rows[0].keys() != rows[1].keys():
        seeds = " and ".join(f"{name} has {', '.join(sorted(row))}" for name, row in zip((a, b), rows, strict=True))
        raise ConfigurationError(f"{seeds}: pairs need the same seeds; name single runs with --pair")
    return [(rows[0][seed], rows[1][seed]) for seed in sorted(rows[0])]


def _check_pair(a: ImageSet, b: ImageSet) -> bool:
    """Whether two sets are runs of the same noise and labels, False where that is not known; ConfigurationError otherwise."""
    if a.num_images != b.num_images:
        raise ConfigurationError(
            f"{a.name} has {a.num_images} samples, {b.name} {b.num_images}: a paired comparison needs the same ones of both; "
            "make both with the same data.num_samples"
        )
    runs = [read_run(images.source.run.path) for images in (a, b) if isinstance(images.source, RunImages)]
    if len(runs) < 2:
        return False
    for option in ("seed", "labels"):
        then, now = (requested(run, option) for run in runs)
        if then != now:
            raise ConfigurationError(
                f"{a.name} was sampled with data.{option} {then}, {b.name} with {now}: a paired comparison needs the same noise "
                "and labels; sample both with the same, or compare independent runs with calib-guidance evaluate"
            )
    return True


class _Pair:
    """Values and differences of the metrics of one pair."""

    def __init__(self, provenance: dict[str, Any]):
        self.rows: dict[str, tuple[MetricSpec, float, float, PairedDifference]] = {}  # by key: A, B, A − B
        self.notes: list[str] = []
        self.provenance = provenance


def _pair_differences(quality: Quality, a: ImageSet, b: ImageSet, num_blocks: int) -> _Pair:
    results, sets = [], []
    for images in (a, b):
        results.append(quality.measure(images, progress=True))
        sets.append(quality.samples)
    pair = _Pair({"lines": described(results[0])[:3], **results[0]["provenance"]})
    pair.notes = [note for note in results[0]["notes"] if "biased upwards" not in note]
    for column in ("index", "label"):
        if not torch.equal(sets[0].rows[column], sets[1].rows[column]):
            raise ConfigurationError(f"{a.name} and {b.name} have samples of different {column}: they are not paired")
    try:
        block = jackknife_blocks(sets[0].labels, num_blocks)
    except ValueError as error:
        raise ConfigurationError(f"--blocks: {error}") from error
    left = len(block) - -(-len(block) // num_blocks)  # samples without a block
    for spec in quality.specs:
        values = [results[number].get(spec.key) for number in (0, 1)]
        if not all(isinstance(value, float | int) for value in values) or not spec.jackknife:
            continue
        if quality.measures.full_rank and left < spec.fewest(quality.measures)[0]:
            pair.notes.append(f"{spec.label}: too few samples without a block ({left}); take more --blocks")
            continue
        without = [torch.tensor([_value(spec, samples, block != g) for g in range(num_blocks)]) for samples in sets]
        difference = paired_difference(tuple(values), tuple(without), spec.option in _UNBIASED)
        pair.rows[spec.key] = (spec, *values, difference)
    return pair


def _value(spec: MetricSpec, samples: SampleSet, kept: torch.Tensor) -> float:
    """A metric of some of the samples."""
    rows = {name: values[kept] for name, values in samples.rows.items()}
    found = spec.compute(SampleSet(samples.measures, samples.reference, rows, values_only=True))
    return float(found.value if isinstance(found, Estimate) else found)


def _content(found: Sequence[_Pair], num_blocks: int) -> dict[str, Any]:
    """``metrics`` of ``comparison.json``: values, difference and verdict by key."""
    metrics = {}
    for key, (spec, *_) in found[0].rows.items():
        pairs = [pair.rows[key] for pair in found if key in pair.rows]
        differences = [difference for *_, difference in pairs]
        mean = differences[0] if len(pairs) == 1 else mean_difference(differences, num_blocks)
        metrics[key] = {
            "label": spec.label,
            "format": spec.format,
            "a": sum(a for _, a, _, _ in pairs) / len(pairs),
            "b": sum(b for _, _, b, _ in pairs) / len(pairs),
            "difference": mean._asdict(),
            "differences": [each.value for each in differences],
            "sign_test": sign_test([each.value for each in differences]) if len(pairs) > 1 else None,
            "verdict": _verdict(spec, mean),
        }
    return {"metrics": metrics}


def _verdict(spec: MetricSpec, difference: PairedDifference) -> str:
    if not difference.distinguishable:
        return "indistinguishable"
    if spec.higher_is_better is None:
        return "A above B" if difference.value > 0 else "A below B"
    return "A better" if (difference.value > 0) == spec.higher_is_better else "B better"


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    """Print and write the table."""
    several = len(content["pairs"]) > 1
    titles = ["", "A", "B", "A − B", "95 % interval", "resolves", *(["sign test p"] if several else []), "verdict"]
    table = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 2) + "|---|"]
    for row in content["metrics"].values():
        d, text = row["difference"], row["format"].format
        cells = [row["label"], text(row["a"]), text(row["b"]), text(d["value"])]
        cells += [f"{text(d['low'])} … {text(d['high'])}", text(d["resolvable"])]
        cells += [f"{row['sign_test']:.3f}"] if several else []
        table.append(f"| {' | '.join([*cells, row['verdict']])} |")
    shorter = [
        row["difference"]["unpaired_std"] / row["difference"]["std"]
        for row in content["metrics"].values()
        if row["difference"]["std"] > 0
    ]
    lines = [
        *content["provenance"]["lines"],
        f"intervals  delete-block jackknife over samples, {content['blocks']} blocks, the reference fixed; of Fréchet distances "
        "the bias of few samples is removed: A − B may differ from the difference of the columns",
        "resolves   the smallest true difference that such an interval tells from zero in 4 of 5 repetitions",
    ]
    if shorter:
        lines.append(
            f"noise      common noise makes intervals {math.exp(_mean_log(shorter)):.1f} times shorter (geometric mean)"
        )
    if several and len(content["pairs"]) < 6:
        lines.append(f"sign test  {len(content['pairs'])} pairs cannot reach p < 0.05; six can")
    lines += [f"note       {note}" for note in content["notes"]]
    print("", *table, *lines, sep="\n")
    write_json(folder / "comparison.json", content)
    write_text(folder / "comparison.md", "\n".join([*table, "", *(f"- {line}" for line in lines), ""]))
    print(f"wrote {folder / 'comparison.json'}, comparison.md")


def _mean_log(values: Sequence[float]) -> float:
    return sum(map(math.log, values)) / len(values)
