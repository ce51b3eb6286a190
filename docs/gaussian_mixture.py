"""What inputs, temperatures and regularisers do to guided sampling, against a density that is known.

Writes ``gaussian_mixture.md``, ``images/gaussian_mixture.png`` and ``images/direction_field.png``:
``python docs/gaussian_mixture.py [--output docs]``.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from calib_guidance.classifiers.gaussian_mixture import GaussianMixtureClassifier
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.plots import COLORS, Contours, direction_field
from calib_guidance.samplers import DDIM, DDPM, Sampler
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, Score, TemperedLogProb, Tilted
from calib_guidance.scores.regularized import smoothed_one_hot_log

BLUE, VERMILION, BLACK = COLORS[0], COLORS[1], COLORS[6]
HALO = [withStroke(linewidth=2, foreground="white")]

# Four classes that overlap, so that the classifier is often unsure; class 0 is guided to.
MEANS = [[0.1, 0.6], [1.4, -0.1], [-1.3, 0.2], [0.2, -1.2]]
COVARIANCES = [
    [[0.45, 0.15], [0.15, 0.30]],
    [[0.25, -0.10], [-0.10, 0.35]],
    [[0.30, 0.08], [0.08, 0.40]],
    [[0.50, -0.20], [-0.20, 0.30]],
]
WEIGHTS = [0.25, 0.2, 0.3, 0.25]
Y, STEPS, SEED = 0, 250, 0
GROUP = 10
EXTENT, CELLS = 4.5, 360
LIMITS = -2.15, 2.35, -1.9, 2.2


class Method(NamedTuple):
    """``drawn`` methods have a panel, all have a row."""

    name: str
    score: Score | None = None
    classifier_input: str = "x0"
    backprop_through_denoiser: bool = False
    drawn: bool = True


METHODS = [
    Method("exact samples"),
    Method("plain, xₜ (exact)", TemperedLogProb(), "x_t"),
    Method("plain, x̂₀", TemperedLogProb()),
    Method("plain, through x̂₀(xₜ)", TemperedLogProb(), backprop_through_denoiser=True),
    Method("τ₂ = 0.5", TemperedLogProb(1.0, 0.5)),
    Method("τ₂ = 0", TemperedLogProb(1.0, 0.0)),
    Method("entropy, λ = 1", EntropyRegularized(1.0)),
    Method("rkl, α = 1", DivergenceRegularized("rkl", 1.0)),
    Method("fkl, α = 1", DivergenceRegularized("fkl", 1.0)),
    Method("js, α = 1", DivergenceRegularized("js", 1.0)),
    Method("hellinger, α = 1", DivergenceRegularized("hellinger", 1.0)),
    Method("tilted, t = −1", Tilted(-1.0, GROUP)),
    Method("entropy, λ = 0.1", EntropyRegularized(0.1), drawn=False),
    *(
        Method(f"{name}, α = 0.1", DivergenceRegularized(name, 0.1), drawn=False)
        for name in ("rkl", "fkl", "js", "hellinger")
    ),
    Method("tilted, t = −0.2", Tilted(-0.2, GROUP), drawn=False),
]


class Measured(NamedTuple):
    energy: float
    to_nominal: float | None
    fraction: float
    offset: float
    variance_ratio: float


class Gaussians:
    """The same noise for every method."""

    def __init__(self, n: int):
        self.n, self.generator = n, torch.Generator().manual_seed(SEED)

    def __call__(self) -> Tensor:
        return torch.randn(self.n, 2, 1, 1, generator=self.generator)


def draw(method: Method, mixture: GaussianMixture, sampler: Sampler, n: int) -> Tensor:
    """``(n, 2, 1, 1)`` samples of class Y."""
    if method.score is None:
        return mixture.sample(n, Y, torch.Generator().manual_seed(SEED + 1))
    classifier = GaussianMixtureClassifier(mixture, noise_aware=method.classifier_input == "x_t")
    guidance = ClassifierGuidance(
        classifier,
        method.score,
        classifier_input=method.classifier_input,
        backprop_through_denoiser=method.backprop_through_denoiser,
    )
    return sampler(mixture, Gaussians(n), torch.full((n,), Y), guidance)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2E|a−b| − E|a−a'| − E|b−b'|, unbiased, of samples ``(n, 2, 1, 1)``: about 0 where both have one distribution."""

    def mean_distance(a: Tensor, b: Tensor) -> float:
        return float(torch.cdist(a.flatten(1), b.flatten(1)).mean(dtype=torch.float64))

    within = (mean_distance(v, v) * len(v) / (len(v) - 1) for v in (a, b))
    return 2 * mean_distance(a, b) - sum(within)


def grid() -> Tensor:
    """Centers of cells ``(CELLS², 2, 1, 1)``, x fastest."""
    v = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 * EXTENT - EXTENT
    return torch.cartesian_prod(v, v).flip(1)[:, :, None, None]


def nominal(method: Method, mixture: GaussianMixture) -> Tensor | None:
    """p(x)·exp(S(x)) ``(CELLS²,)``, normalized; None where a sample's score depends on others."""
    if method.score is None or method.score.group_size > 1:
        return None
    x = grid()
    score = method.score(mixture.log_joint(x), torch.full((len(x),), Y))
    return (mixture.log_prob(x) + score).softmax(0)


def draw_from_grid(cells: Tensor, n: int) -> Tensor:
    """``(n, 2, 1, 1)`` samples, uniform within a cell."""
    generator = torch.Generator().manual_seed(SEED + 2)
    chosen = torch.multinomial(cells, n, replacement=True, generator=generator)
    inside = (torch.rand(n, 2, 1, 1, generator=generator, dtype=torch.float64) - 0.5) * 2 * EXTENT / CELLS
    return (grid()[chosen] + inside).float()


def measure(x: Tensor, mixture: GaussianMixture, exact: Tensor, target: Tensor | None) -> Measured:
    """``exact``: samples of the class; ``target``: cells of the nominal target."""
    flat = x.flatten(1).double()
    return Measured(
        energy_distance(x, exact),
        None if target is None else energy_distance(x, draw_from_grid(target, len(x))),
        float((mixture.log_joint(x).argmax(1) == Y).double().mean()),
        float((flat.mean(0) - mixture.means[Y]).norm()),
        float(flat.var(0).sum() / mixture.variances[Y].sum()),
    )


def regions(cells: Tensor, masses: Sequence[float] = (0.9, 0.5)) -> Contours:
    """The smallest regions that hold so much of the mass."""
    ordered = cells.sort(descending=True).values
    levels = [float(ordered[(ordered.cumsum(0) < mass).sum()]) for mass in masses]
    v = (torch.arange(CELLS) + 0.5) / CELLS * 2 * EXTENT - EXTENT
    return Contours(v, v, cells.view(CELLS, CELLS), levels)


def contours(axis: plt.Axes, cells: Tensor, masses: Sequence[float] = (0.9, 0.5), **style: object) -> None:
    x, y, density, levels = regions(cells, masses)
    axis.contour(x, y, density, levels=levels, **style)


def frame(axis: plt.Axes, mixture: GaussianMixture, title: str) -> None:
    joint = mixture.log_joint(grid())
    for k, (x, y) in enumerate(mixture.means.tolist()):
        if k != Y:
            contours(axis, joint[:, k].softmax(0), [0.5], colors="0.72", linewidths=0.8, zorder=1)
            axis.text(x, y, str(k), fontsize=8, color="0.3", ha="center", va="center", zorder=4, path_effects=HALO)
    axis.plot(*mixture.means[Y].tolist(), marker="*", color="white", mec=BLACK, mew=0.7, ms=8, zorder=5, ls="")
    axis.set(xlim=LIMITS[:2], ylim=LIMITS[2:], xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=8.5, pad=3)
    for side in axis.spines.values():
        side.set_color("0.7")


def gradients(x: Tensor, mixture: GaussianMixture, conditional: bool) -> Tensor:
    """``(n, 2)``: ∇log p(y | x), or ∇log p(x, y)."""
    x = x.double().clone().requires_grad_()
    score = TemperedLogProb(1.0, 1.0 if conditional else 0.0)(mixture.log_joint(x), torch.full((len(x),), Y))
    return torch.autograd.grad(score.sum(), x)[0].flatten(1)


def draw_field(mixture: GaussianMixture, path: Path) -> None:
    """∇log p(x, y) and ∇log p(y | x) of clean samples, on a coarse grid."""
    x = torch.cartesian_prod(torch.linspace(-2.0, 2.2, 13), torch.linspace(-1.75, 2.05, 12))[:, :, None, None]
    joint = mixture.log_joint(grid())
    direction_field(
        x.flatten(1),
        {
            r"joint: $\nabla\log p(x, y)$": gradients(x, mixture, False),
            r"conditional: $\nabla\log p(y\,|\,x)$": gradients(x, mixture, True),
        },
        mixture.means[Y],
        path,
        regions(joint[:, Y].softmax(0)),
        [regions(joint[:, k].softmax(0), [0.5]) for k in range(len(MEANS)) if k != Y],
        limits=LIMITS,
    )


def draw_plot(samples: dict[str, Tensor], measured: dict[str, Measured], mixture: GaussianMixture, path: Path) -> None:
    drawn = [method for method in METHODS if method.drawn]
    own = mixture.log_joint(grid())[:, Y].softmax(0)
    figure = plt.figure(figsize=(7.2, 5.9))
    rows = figure.add_gridspec(3, 4, hspace=0.2, wspace=0.08)
    for place, method in enumerate(drawn):
        axis = figure.add_subplot(rows[place // 4, place % 4])
        x = samples[method.name].flatten(1)[:1000]
        axis.scatter(*x.T, s=2.5, color=BLUE, alpha=0.45, lw=0, rasterized=True)
        contours(axis, own, colors=BLACK, linewidths=0.9)
        target = nominal(method, mixture)
        if target is not None:
            contours(axis, target, colors=VERMILION, linewidths=1.1, linestyles="--")
        frame(axis, mixture, method.name)
        axis.text(0.03, 0.03, f"{max(measured[method.name].energy, 0):.3f}", transform=axis.transAxes, fontsize=7.5)
    entries = [
        (Line2D([], [], color=BLACK, lw=0.9), "p(x | y), exact: 50, 90 % of mass"),
        (Line2D([], [], color=VERMILION, lw=1.1, ls="--"), "p(x)·exp S(x), nominal"),
        (Line2D([], [], color="0.72", lw=0.8), "other classes: 50 % of mass"),
        (Line2D([], [], color=BLUE, marker="o", ms=3, ls=""), "samples"),
        (Line2D([], [], color="white", marker="*", mec=BLACK, mew=0.7, ms=8, ls=""), "μ of the class y"),
        (Line2D([], [], ls=""), "lower left: energy distance to p(x | y)"),
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.1), "ncols": 3}
    figure.legend(*zip(*entries, strict=True), fontsize=8, frameon=False, handlelength=1.6, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".replace(f"-{0:.{digits}f}", f"{0:.{digits}f}")


def table(measured: dict[str, Measured]) -> str:
    columns = "to p(x \\| y)", "to the nominal target", "fraction of class y", "mean to μ_y", "variance / exact"
    rows = []
    for name, m in measured.items():
        target = "–" if m.to_nominal is None else number(m.to_nominal)
        rows.append(
            (name, number(m.energy), target, number(m.fraction, 3), number(m.offset, 3), number(m.variance_ratio, 2))
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [("guidance", *columns), ("---", *["---:"] * 5), *rows])


def leads_away(mixture: GaussianMixture, conditional: bool) -> float:
    """Fraction of the class, in percent, where the gradient points away from μ_y."""
    x = mixture.sample(100_000, Y, torch.Generator().manual_seed(SEED))
    towards = (gradients(x, mixture, conditional) * (mixture.means[Y] - x.flatten(1))).sum(1)
    return 100 * float((towards < 0).double().mean())


def went(before: float, after: float, digits: int) -> str:
    return f"{'up' if after > before else 'down'} from {number(before, digits)} to {number(after, digits)}"


def some(chosen: Sequence[str], of: Sequence[str]) -> str:
    return "all" if len(chosen) == len(of) else str(len(chosen)) if chosen else "none"


def report(
    ddpm: dict[str, Measured], ddim: dict[str, Measured], floor: Tensor, mixture: GaussianMixture, n: int
) -> str:
    """The Markdown page; what it says of the numbers is put together from them."""
    exact, aware, plain, through = (method.name for method in METHODS[:4])
    bound = float(floor.mean() + 5 * floor.std())
    joint = mixture.log_joint(grid())
    own = math.exp(
        smoothed_one_hot_log(torch.tensor([Y]), len(MEANS), DivergenceRegularized().epsilon, torch.float64)[0, Y]
    )
    share = float(joint[:, Y].softmax(0) @ (joint.argmax(1) == Y).double())
    p, others = ddpm[plain], {name: m for name, m in ddpm.items() if name not in (exact, aware)}
    ranked = sorted(others, key=lambda name: others[name].energy)
    closer = [f"“{name}”" for name in ranked if others[name].energy < p.energy - bound]
    # Three standard errors, of a fraction and of a variance of n numbers in each of two directions.
    larger = [name for name in others if others[name].fraction > share + 3 * math.sqrt(share * (1 - share) / n)]
    narrower = [name for name in others if others[name].variance_ratio < 1 - 3 * math.sqrt(2 / n)]
    with_target = [name for name in others if others[name].to_nominal is not None]
    missed = [name for name in with_target if others[name].to_nominal > bound]
    weak = [ddpm[method.name].energy for method in METHODS if not method.drawn]
    far = [f"“{name}”" for name in ddim if ddim[name].energy > bound]
    near = (
        "is as close as exact samples are" if ddpm[aware].energy <= bound else "is further off than exact samples are"
    )
    softened = [ddpm[name] for name in (plain, "τ₂ = 0.5", "τ₂ = 0")]
    findings = [
        f"“{aware}” {near}: {number(ddpm[aware].energy)}. Its p(xₜ)·p(y | xₜ) is the density of the class at every noise level.",
        f"“{plain}”, whose classifier is exact on clean samples, follows another gradient: "
        f"fraction {went(share, p.fraction, 3)}, variance {went(1, p.variance_ratio, 2)}. "
        f"Carried through the denoiser, its energy distance goes {went(p.energy, ddpm[through].energy, 4)}.",
        f"At τ₂ = 1, 0.5, 0 the variance is {', '.join(number(m.variance_ratio, 2) for m in softened)}, the fraction "
        f"{', '.join(number(m.fraction, 3) for m in softened)} and the energy distance "
        f"{', '.join(number(m.energy) for m in softened)}.",
        f"Of the {len(others)} rows below “{aware}”, {some(larger, others)} have a larger fraction of the class "
        f"than p(x | y) and {some(narrower, others)} a smaller variance, by three standard errors. "
        f"“{ranked[0]}” is closest to p(x | y), “{ranked[-1]}” furthest. "
        f"Closer than “{plain}” by a difference: {', '.join(closer) or 'none'}.",
        f"In the last rows, with the smaller weights, the energy distance lies between {number(min(weak))} and "
        f"{number(max(weak))}; that of “{plain}” is {number(p.energy)}.",
        f"Of the {len(with_target)} of those rows that have a nominal target, {some(missed, with_target)} miss it by a "
        "difference.",
        "The conditional gradient points away from μ_y at "
        f"{leads_away(mixture, True):.1f} % of the class, the joint one at {leads_away(mixture, False):.1f} % (second picture; "
        "Proposition 4.2 of arXiv 2310.11311).",
    ]
    paragraphs = [
        "# Scores on a known density",
        f"An unconditional model of {len(MEANS)} overlapping Gaussians in two dimensions is guided to class y = {Y} with "
        "scale 1. Denoiser and classifier are closed forms and nothing is trained. A difference between the samples "
        "and p(x | y), the exact density of the class, comes from the method alone, up to the discretization error in "
        "the second row. "
        f"Each row is {n} samples of DDPM with {STEPS} steps, all from the same noise. Unless its name says otherwise, "
        f"the classifier of clean samples sees x̂₀, τ₁ = τ₂ = 1, and ε = 0.9, a target q of {number(own, 3)} for the "
        f"class. The weights in the picture are larger than those of arXiv 2511.05844 (α = 0.05 … 0.15, t = −0.2), "
        f"which makes their effect visible. The last rows of the table use weights of that size. `python "
        f"docs/gaussian_mixture.py` writes this page and the sentences about its numbers.",
        "![Samples and densities of each method](images/gaussian_mixture.png)",
        "The nominal target is p(x)·exp S(x) of clean samples. The first two columns are energy distances; their "
        f"estimate is unbiased, so values below 0 occur. Two exact sets of this size are {number(float(floor.mean()))} "
        f"± {number(float(floor.std()))} apart "
        f"(mean and deviation of {len(floor)} pairs); {number(bound)}, five deviations above that, counts as a "
        f"difference. Under p(x | y) itself the fraction is {number(share, 3)}, since the classes overlap.",
        table(ddpm),
        "\n".join(f"- {finding}" for finding in findings),
        "![Joint and conditional direction](images/direction_field.png)",
        "Arrows of length ∝ √|∇|; arrows in the second color lead away from μ of the class. Black contours hold 50 and "
        "90 % of p(x | y), gray ones half of each other class.",
        f"The same with DDIM, {STEPS} steps. Its path is deterministic: what guidance adds at high noise stays in the "
        f"sample. In DDPM the noise of later steps can remove it.",
        table(ddim),
        f"Different from p(x | y): {', '.join(far) or 'none'}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What guidance does to a known density.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page and of images/")
    parser.add_argument("-n", type=int, default=4000, help=f"samples per method, a multiple of {GROUP}")
    arguments = parser.parse_args()
    mixture = GaussianMixture(MEANS, COVARIANCES, WEIGHTS)
    sets = [mixture.sample(arguments.n, Y, torch.Generator().manual_seed(100 + k)) for k in range(6)]
    floor = torch.tensor([energy_distance(a, b) for a, b in itertools.combinations(sets, 2)])
    samples = {method.name: draw(method, mixture, DDPM(STEPS), arguments.n) for method in METHODS}
    deterministic = {method.name: draw(method, mixture, DDIM(STEPS), arguments.n) for method in METHODS[1:6]}
    targets = {method.name: nominal(method, mixture) for method in METHODS}
    ddpm, ddim = (
        {name: measure(x, mixture, sets[0], targets[name]) for name, x in drawn.items()}
        for drawn in (samples, deterministic)
    )
    draw_field(mixture, arguments.output / "images" / "direction_field")
    draw_plot(samples, ddpm, mixture, arguments.output / "images" / "gaussian_mixture.png")
    (arguments.output / "gaussian_mixture.md").write_text(report(ddpm, ddim, floor, mixture, arguments.n))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
