"""How well few samples rank the settings of a grid: ``python docs/sweep_ranking.py``.

Runs lightning_configs/experiments/digits_grid.yaml where it is not done (``outputs/experiments``), takes the metrics of few
samples from the shards of its runs, and puts a table into docs/experiments.md and a plot into docs/images/.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from calib_guidance.backend.images import to_uint8
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.experiments.experiment import Experimenter, halve, insert, read_value
from calib_guidance.experiments.settings import Plan, make_plan
from calib_guidance.metrics import CalibrationError, frechet_distance, mean_and_covariance
from calib_guidance.plots import COLORS, COLUMN, paper, save
from calib_guidance.runs import RunFolder

DOCS = Path(__file__).parent
CONFIG = Path("lightning_configs/experiments/digits_grid.yaml")
FEW, MORE = 60, 180  # digits, a shard and three
METRICS_OF_FEW = ("integral_ece", "fd")
Measured = dict[tuple[str, int, int, range], float]  # metric, setting, seed, shards


class Reader:
    """Figures of some shards of runs, as a run of these samples alone would report them."""

    def __init__(self, plan: Plan):
        (command,) = plan.settings[0].commands
        cli = run_lightning(["predict", "--config", command.configs[0]], ParsedCLI)
        (node,) = [c for c in cli.options.trainer.callbacks if c.class_path.endswith("SampleQuality")]
        (self.quality,) = cli.build("trainer.callbacks", [node])
        self.quality.features.eval()
        reference = torch.stack([item["image"] for item in self.quality.reference])
        self.reference = self._features(to_uint8(reference, "truncate"))

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.quality.features(images)[0]

    def load(self, folder: Path) -> None:
        """A run; its features are extracted once."""
        run = RunFolder.open(folder)
        self.sums = [run.read_sums(shard) for shard in run.shards()]
        self.features = [self._features(torch.from_numpy(run.read(shard)["image"])) for shard in run.shards()]

    def read(self, metric: str, shards: range) -> float:
        """A metric of some shards of the run."""
        if metric == "fd":
            features = torch.cat([self.features[shard] for shard in shards])
            return float(frechet_distance(*mean_and_covariance(self.reference), *mean_and_covariance(features)))
        (name,) = [name for name in self.sums[0] if name.startswith("TrajectoryCalibration")]
        sums = sum(torch.from_numpy(self.sums[shard][name]) for shard in shards)
        error = CalibrationError(15, num_levels=len(sums), sync_on_compute=False)
        error.sums = sums
        return float(error.compute().by_level.nanmean())


def read_all(experimenter: Experimenter) -> tuple[Measured, list[range]]:
    """Both metrics of every run: of each block of few samples, of its start, and of all of it."""
    found, reader = {}, Reader(experimenter.plan)
    columns = {column.key: column for column in experimenter.plan.columns}
    for (setting, seed, count), run in experimenter.runs.items():
        reader.load(run.folder)
        blocks = [range(start, start + 1) for start in range(count // FEW)]
        complete = range(count // FEW)
        for shards in (*blocks, range(MORE // FEW), complete):
            for metric in METRICS_OF_FEW:
                found[metric, setting, seed, shards] = reader.read(metric, shards)
        for metric in METRICS_OF_FEW:  # what the run itself has reported
            said = read_value(columns[metric], run.folder)
            assert abs(found[metric, setting, seed, complete] - said) < 1e-3 * max(1, said), (metric, run.folder)
    return found, blocks


def _row(name: str, share: float, picks: Sequence[int], truths: Sequence[list[float]], tops: Sequence[set[int]]) -> str:
    """A line of the table: how often the winner is picked, or kept, and what the picks lose."""
    winners = [truth.index(min(truth)) for truth in truths]
    first = statistics.mean(pick == winner for pick, winner in zip(picks, winners, strict=True))
    kept = statistics.mean(winner in top for winner, top in zip(winners, tops, strict=True)) if tops else None
    regret = statistics.mean(truth[pick] - min(truth) for pick, truth in zip(picks, truths, strict=True))
    return f"| {name} | {len(picks)} | {share:.0%} | {first:.0%} | {'–' if kept is None else f'{kept:.0%}'} | {regret:.3f} |"


def make_table(found: Measured, blocks: Sequence[range], plan: Plan) -> str:
    """Ranking by one seed, or two, against the mean Fréchet distance of all samples of the other seeds."""
    settings, complete = range(len(plan.settings)), range(len(blocks))
    seeds, num_samples = plan.experiment.seeds, plan.experiment.num_samples
    keep = max(1, len(settings) // 3)

    def truth(*without: int) -> list[float]:
        others = [seed for seed in seeds if seed not in without]
        return [statistics.mean(found["fd", n, s, complete] for s in others) for n in settings]

    lines = [
        "| ranked by | draws | samples | finds the winner | winner in the best third | regret | rank correlation |",
        "|---|" + "---:|" * 6,
    ]
    shuffled = [statistics.mean(t) - min(t) for t in map(truth, seeds)]
    chance = [f"{1 / len(settings):.0%}", f"{keep / len(settings):.0%}", f"{statistics.mean(shuffled):.3f}"]
    lines.append(f"| chance | – | 0% | {' | '.join(chance)} | 0 |")
    for metric, parts in itertools.product(METRICS_OF_FEW, (list(blocks), [range(MORE // FEW)], [complete])):
        draws = [(seed, shards) for seed in seeds for shards in parts]
        ranked = [sorted(settings, key=lambda n: found[metric, n, s, b]) for s, b in draws]
        truths = [truth(seed) for seed, _ in draws]
        rho = [
            spearmanr([found[metric, n, s, b] for n in settings], t).statistic
            for (s, b), t in zip(draws, truths, strict=True)
        ]
        count = FEW * len(parts[0])
        title = f"{METRICS[metric].title[:-2]}, {count} samples"
        picks, tops = [order[0] for order in ranked], [set(order[:keep]) for order in ranked]
        row = _row(title, count / num_samples, picks, truths, tops)
        lines.append(f"{row} {statistics.mean(rho):.2f} ({min(rho):.2f} … {max(rho):.2f}) |")
    halvings = {
        "halving by integral ECE": (("integral_ece",) * 3, 3, 1),
        "halving by integral ECE, then Fréchet": (("integral_ece", *("fd",) * 2), 3, 1),
        "halving by Fréchet": (("fd",) * 3, 3, 1),
        "halving by Fréchet, one in six promoted": (("fd",) * 2, 6, 1),
        "the same with two seeds, as tune does": (("fd",) * 2, 6, 2),
    }
    for title, (by, factor, together) in halvings.items():
        rungs = [FEW, MORE, num_samples] if factor == 3 else [FEW, num_samples]
        # With a rung between them few samples are the first of more; else any block of them may be the few.
        starts = blocks[:1] if factor == 3 else blocks
        picks, truths, share = [], [], 0.0
        for used, first in itertools.product(itertools.combinations(seeds, together), starts):

            def measure(
                asked: Sequence[int], count: int, used: Sequence[int] = used, first: range = first
            ) -> list[float]:
                shards = first if count == FEW else range(count // FEW)
                metric = by[rungs.index(count)]  # noqa: B023 (called here)
                return [statistics.mean(found[metric, n, seed, shards] for seed in used) for n in asked]

            samples = halve(settings, rungs, factor, measure)
            kept = [n for n in settings if samples[n] == num_samples]
            picks.append(kept[int(np.argmin(measure(kept, num_samples)))])
            truths.append(truth(*used))
            share += sum(samples.values()) / len(samples) / num_samples
        lines.append(f"{_row(title, share / len(picks), picks, truths, [])} – |")
    return "\n".join(lines)


@paper
def draw(found: Measured, blocks: Sequence[range], plan: Plan, path: Path) -> list[Path]:
    """Fréchet distance of all samples over the integral ECE of few; each point a setting, mean and deviation over seeds."""
    complete = range(len(blocks))
    figure = Figure(figsize=(COLUMN, 2.6))
    axis = figure.subplots()
    scales = list(dict.fromkeys(setting.labels["scale"] for setting in plan.settings))

    def pair(number: int, name: str, shards: range) -> tuple[float, float]:
        values = [found[name, number, seed, shards] for seed in plan.experiment.seeds]
        return statistics.mean(values), statistics.stdev(values)

    for number, setting in enumerate(plan.settings):
        (x, dx), (y, dy) = pair(number, "integral_ece", blocks[0]), pair(number, "fd", complete)
        place = scales.index(setting.labels["scale"])
        filled = setting.labels["tau2"] == "1"
        style = {"color": COLORS[place], "marker": "os^D"[place], "mfc": COLORS[place] if filled else "white"}
        label = f"scale {setting.labels['scale']}" if filled and setting.labels["score"] == "tempered" else "_"
        axis.errorbar(x, y, dy, dx, ms=4, lw=0, elinewidth=0.6, label=label, **style)
    axis.set_xlabel(f"integral ECE of {FEW} samples ↓")
    axis.set_ylabel(f"Fréchet distance of {plan.experiment.num_samples} samples ↓")
    axis.set_title("filled: τ2 = 1, hollow: τ2 = 0.5", fontsize=7)
    axis.legend()
    return save(figure, path)


def main(finish: Callable[[str], None]) -> None:
    experimenter = Experimenter(make_plan(CONFIG), Path("outputs/experiments"), workers=2)
    experimenter.run()
    found, blocks = read_all(experimenter)
    finish(make_table(found, blocks, experimenter.plan))
    draw(found, blocks, experimenter.plan, DOCS / "images/sweep_ranking")


if __name__ == "__main__":

    def finish(text: str) -> None:
        print(text)
        insert(text, "ranking", DOCS / "experiments.md")

    main(finish)
