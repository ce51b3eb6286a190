"""What each rule and negative samples, against two densities that are known.

Writes the table of ``guidance_rules.md`` and ``images/guidance_rules.png``: ``python docs/guidance_rules.py [--output docs]``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import gaussian_mixture as page
import matplotlib.pyplot as plt
import torch
from gaussian_mixture import BLACK, BLUE, VERMILION, Y
from matplotlib.lines import Line2D
from torch import Tensor

from calib_guidance.denoisers import (
    APG,
    MAMBOG,
    TCFG,
    Autoguidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    FeedbackGuidance,
    GaussianMixture,
    IndependentCondition,
    Negative,
    RescaledGuidance,
    Rule,
    Scheduled,
    TwoNegatives,
    Unconditional,
)
from calib_guidance.diffusion.interval import Interval
from calib_guidance.experiments.experiment import insert
from calib_guidance.samplers import DDIM, DDPM

WEIGHTS = (1.5, 2.0, 4.0)
DRAWN = 2.0  # the weight of the panels
SAMPLERS = DDIM("100"), DDPM("250")
CONDITIONAL = GaussianMixture(page.MEANS, page.COVARIANCES, page.WEIGHTS, class_conditional=True)
WEAK = GaussianMixture(
    page.MEANS,
    [[[2 * value for value in row] for row in matrix] for matrix in page.COVARIANCES],
    page.WEIGHTS,
    class_conditional=True,
)


class Setting(NamedTuple):
    """A combination; ``weight`` is w, or None where the rule has no weight of that kind."""

    name: str
    weight: float | None
    rule: Rule
    negative: Negative | None = None
    interval: Interval | None = None

    def denoiser(self) -> Denoiser:
        return Combination(CONDITIONAL, self.rule, self.negative, self.interval)


def settings() -> list[Setting]:
    found = []
    for w in WEIGHTS:
        cfg = ClassifierFreeGuidance(w)
        found += [
            Setting("classifier-free", w, cfg),
            Setting("classifier-free, σ in [0.2, 2]", w, cfg, interval=Interval(sigma_interval=[0.2, 2.0])),
            Setting("classifier-free, linear schedule", w, Scheduled(cfg, "linear")),
            Setting("classifier-free, cosine schedule", w, Scheduled(cfg, "cosine")),
            Setting("rescaled, φ = 0.7", w, RescaledGuidance(w)),
            Setting("APG, η = 0", w, APG(w)),
            Setting("APG, η = 1", w, APG(w, parallel=1.0)),
            Setting("CFG-Zero*", w, CFGZeroStar(w)),
            Setting("TCFG", w, TCFG(w)),
            Setting("MAMBO-G, α = 1", w, MAMBOG(w, damping=1.0)),
            Setting("autoguidance, twice the covariance", w, cfg, Autoguidance(WEAK)),
            Setting(
                "half classifier-free, half autoguidance", w, cfg, TwoNegatives(Unconditional(), Autoguidance(WEAK))
            ),
            Setting("independent condition", w, cfg, IndependentCondition()),
        ]
    found += [Setting(f"CFG++, λ = {weight}", None, CFGPlusPlus(weight)) for weight in (0.02, 0.05, 0.1, 0.3)]
    found += [
        Setting(f"feedback, at most {most:g}", None, FeedbackGuidance(max_weight=most, pi=0.9)) for most in WEIGHTS
    ]
    return sorted(found, key=lambda setting: [other.name for other in found].index(setting.name))


def tempered(weight: float) -> Tensor:
    """p(x)·p(y | x)^w ``(CELLS²,)``, normalized."""
    joint = CONDITIONAL.log_joint(page.grid())
    return (joint.logsumexp(1) + weight * joint.log_softmax(1)[:, Y]).softmax(0)


def draw(setting: Setting, sampler: DDIM | DDPM, n: int) -> Tensor:
    """``(n, 2, 1, 1)`` samples of class Y."""
    return sampler(setting.denoiser(), page.Gaussians(n), torch.full((n,), Y))


def make_table(rows: dict[Setting, list[tuple[Tensor, page.Measured]]]) -> str:
    columns = ("to p(x \\| y)", "to p(x)·p(y \\| x)^w", "class y", "variance")
    lines = [("rule", "w", *(f"{kind}: {column}" for kind in ("DDIM", "DDPM") for column in columns))]
    lines += [("---", *["---:"] * (len(lines[0]) - 1))]
    for setting, found in rows.items():
        cells = [setting.name, "–" if setting.weight is None else f"{setting.weight:g}"]
        for x, m in found:
            if x is None:
                cells += ["–"] * len(columns)
                continue
            target = "–" if m.to_nominal is None else page.number(m.to_nominal, 3)
            variance = page.number(m.variance_ratio, 2) if m.variance_ratio < 100 else "> 100"
            cells += [page.number(m.energy, 3), target, page.number(m.fraction, 3), variance]
        lines.append(tuple(cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_plot(rows: dict[Setting, list[tuple[Tensor, page.Measured]]], path: Path) -> None:
    drawn = [s for s in rows if s.weight == DRAWN or s.name in ("none", "CFG++, λ = 0.05", "feedback, at most 2")]
    figure = plt.figure(figsize=(7.2, 7.7))
    grid = figure.add_gridspec(-(-len(drawn) // 4), 4, hspace=0.3, wspace=0.08)
    own = CONDITIONAL.log_joint(page.grid())[:, Y].softmax(0)
    for place, setting in enumerate(drawn):
        axis = figure.add_subplot(grid[place // 4, place % 4])
        x, measured = rows[setting][0]
        axis.scatter(*x.flatten(1)[:1000].T, s=2.5, color=BLUE, alpha=0.45, lw=0, rasterized=True)
        page.contours(axis, own, colors=BLACK, linewidths=0.9)
        if setting.weight == DRAWN:
            page.contours(axis, tempered(DRAWN), colors=VERMILION, linewidths=1.1, linestyles="--")
        title = "none, w = 1" if setting.name == "none" else setting.name.replace(", ", ",\n", 1)
        page.frame(axis, CONDITIONAL, title)
        axis.text(0.03, 0.03, f"{max(measured.energy, 0):.3f}", transform=axis.transAxes, fontsize=7.5)
    entries = [
        (Line2D([], [], color=BLACK, lw=0.9), "p(x | y): 50, 90 % of mass"),
        (Line2D([], [], color=VERMILION, lw=1.1, ls="--"), "p(x)·p(y | x)^w, w = 2"),
        (Line2D([], [], color="0.72", lw=0.8), "other classes: 50 % of mass"),
        (Line2D([], [], color=BLUE, marker="o", ms=3, ls=""), "samples, DDIM"),
        (Line2D([], [], ls=""), "lower left: energy distance to p(x | y)"),
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.1 * 5.8 / 7.7), "ncols": 3}
    figure.legend(*zip(*entries, strict=True), fontsize=8, frameon=False, handlelength=1.6, **place)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each rule and negative samples.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page and of images/")
    parser.add_argument("-n", type=int, default=4000, help="samples per row")
    arguments = parser.parse_args(argv)
    exact = [CONDITIONAL.sample(arguments.n, Y, torch.Generator().manual_seed(100 + k)) for k in range(6)]
    floor = torch.tensor([page.energy_distance(a, b) for a, b in itertools.combinations(exact, 2)])
    rows = {}
    for setting in [Setting("none", 1.0, ClassifierFreeGuidance(1.0)), *settings()]:
        target = None if setting.weight is None else tempered(setting.weight)
        rows[setting] = []
        for sampler in SAMPLERS:
            if isinstance(setting.rule, CFGPlusPlus) and isinstance(sampler, DDPM):
                rows[setting].append((None, None))
                continue
            x = draw(setting, sampler, arguments.n)
            rows[setting].append((x, page.measure(x, CONDITIONAL, exact[0], target)))
    draw_plot(rows, arguments.output / "images" / "guidance_rules.png")
    said = f"Two exact sets of this size are {floor.mean():.4f} ± {floor.std():.4f} apart."
    insert(f"{make_table(rows)}\n\n{said}", "guidance_rules", arguments.output / "guidance_rules.md")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
