"""Quality against the number of gradients: ``python docs/guidance_cost.py`` (two minutes of one core).

Samples the settings and seeds of lightning_configs/experiments/digits_guidance_cost.yaml in this process, and puts a table into
docs/guidance_cost.md and a plot into docs/images/.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from calib_guidance.backend.counters import FlopCounter
from calib_guidance.backend.images import to_uint8
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI
from calib_guidance.diffusion import SampleStreams
from calib_guidance.experiments.experiment import insert
from calib_guidance.experiments.settings import Plan, make_plan
from calib_guidance.metrics import frechet_distance, mean_and_covariance
from calib_guidance.plots import COLORS, COLUMN, paper, save
from calib_guidance.samplers import StepRecord

DOCS = Path(__file__).parent
CONFIG = Path("lightning_configs/experiments/digits_guidance_cost.yaml")


class Row(NamedTuple):
    """A setting; lists are over seeds."""

    name: str
    distances: list[float]
    accuracies: list[float]
    gradients: float  # of a sample
    runs: float  # steps at which the classifier ran, of a batch
    fraction: float  # guidance's fraction of the FLOPs of the batch


def parsed(plan: Plan, setting: int) -> ParsedCLI:
    """The command of a setting, not run."""
    run = plan.runs([setting], plan.experiment.num_samples, Path("outputs/experiments"))[0]
    return run_lightning(list(run.commands[0]), ParsedCLI)


class Count:
    """An observer that counts gradients."""

    def __init__(self) -> None:
        self.gradients, self.runs = 0, 0

    def __call__(self, record: StepRecord) -> None:
        if record.guided.aux.logits is not None:
            fresh = record.guided.aux.fresh
            self.gradients += len(record.y) if fresh is None else int(fresh.sum())
            self.runs += 1


def operations(plan: Plan) -> tuple[float, float]:
    """FLOPs of one image: of the network at a step, and of one gradient, by the first setting."""
    cli = parsed(plan, 0)
    model = cli.build("model", cli.options.model).eval()
    counts, sampler = [], type(model.sampler)(steps="2")
    for guidance in (None, model.guidance):
        with FlopCounter() as flops:
            noise = SampleStreams([0], [0], model.denoiser.image_shape)
            sampler(model.denoiser, noise, torch.zeros(1, dtype=torch.long), guidance)
        counts.append(flops.get_total_flops() / 2)
    return counts[0], counts[1] - counts[0]


def measure(plan: Plan, setting: int, costs: tuple[float, float]) -> Row:
    """A setting with all seeds, in batches of ``data.batch_size``; ``costs`` are :func:`operations`."""
    cli = parsed(plan, setting)
    model = cli.build("model", cli.options.model).eval()
    (node,) = [c for c in cli.options.trainer.callbacks if c.class_path.endswith("SampleQuality")]
    (quality,) = cli.build("trainer.callbacks", [node])
    quality.features.eval()
    with torch.no_grad():
        heldout = to_uint8(torch.stack([item["image"] for item in quality.reference]), "truncate")
        reference = mean_and_covariance(quality.features(heldout).pool)
    n, size = plan.experiment.num_samples, plan.experiment.set["data.batch_size"]
    y, count, distances, accuracies = torch.arange(n) % 10, Count(), [], []
    for seed in plan.experiment.seeds:
        images = []
        for index in torch.arange(n).split(size):
            noise = SampleStreams([seed] * len(index), index.tolist(), model.denoiser.image_shape)
            images.append(model.sampler(model.denoiser, noise, y[index], model.guidance, [count]))
        with torch.no_grad():
            features, _, logits = quality.features(to_uint8(torch.cat(images), "truncate"))
        distances.append(float(frechet_distance(*reference, *mean_and_covariance(features))))
        accuracies.append(float((logits.argmax(1) == y).double().mean()))
    steps, total = len(model.sampler.levels(model.denoiser).times), n * len(plan.experiment.seeds)
    runs = count.runs / (total / size)
    cost = 0.0
    if model.guidance is not None:
        network, gradient = costs
        cost = runs * gradient / (steps * network + runs * gradient)
    return Row(plan.settings[setting].name, distances, accuracies, count.gradients / total, runs, cost)


def mean(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """Differences are of pairs of one seed, with their standard error."""
    lines = [
        "| a new gradient | of a sample | of a batch | guidance, of the FLOPs | Fréchet ↓ | difference | accuracy ↑ |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        apart = [mine - plain for mine, plain in zip(row.distances, rows[0].distances, strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        difference = "–" if row is rows[0] else f"{statistics.mean(apart):+.3f} ± {error:.3f}"
        lines.append(
            f"| {row.name} | {row.gradients:.1f} | {row.runs:.0f} | {row.fraction:.1%} | {mean(row.distances, 3)} | "
            f"{difference} | {mean(row.accuracies, 3)} |"
        )
    return "\n".join(lines)


@paper
def draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Fréchet distance over gradients: what is reused, and what is not guided in between."""
    figure = Figure(figsize=(COLUMN, 2.4))
    axis = figure.subplots()
    kinds = {
        "reused": [row for row in rows if row.name.endswith("reused")],
        "not guided in between": [row for row in rows if row.name in ("every 4th step",)],
        "weak ones reused": [row for row in rows if "weak" in row.name],
    }
    for (label, points), color, marker in zip(kinds.items(), COLORS, "os^", strict=False):
        joined = sorted([rows[0], *points] if label != "weak ones reused" else points, key=lambda row: row.gradients)
        x, y = ([row.gradients for row in joined], [statistics.mean(row.distances) for row in joined])
        error = [statistics.stdev(row.distances) / len(row.distances) ** 0.5 for row in joined]
        line = "-" if label != "weak ones reused" else ""
        axis.errorbar(x, y, error, color=color, marker=marker, ls=line, ms=4, lw=1, elinewidth=0.6, label=label)
    axis.set_xlabel("gradients of a sample")
    axis.set_ylabel("Fréchet distance ↓")
    axis.legend()
    return save(figure, path)


def main() -> None:
    """Run, print and write."""
    plan = make_plan(CONFIG)
    costs = operations(plan)
    rows = [measure(plan, setting, costs) for setting in tqdm(range(len(plan.settings)), unit="setting")]
    text = table(rows)
    print(text)
    insert(text, "cost", DOCS / "guidance_cost.md")
    draw(rows, DOCS / "images/guidance_cost")


if __name__ == "__main__":
    main()
