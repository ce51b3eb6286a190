"""What inputs, temperatures and regularisers do to guided sampling, against a density that is known.

Writes ``gaussian_mixture.md`` and ``images/gaussian_mixture.png``: ``python docs/gaussian_mixture.py [--output docs]``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from torch import Tensor

from calib_guidance.denoisers.analytic import GaussianMixture, GaussianMixtureClassifier
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.samplers import DDIM, DDPM, Sampler
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, Score, TemperedLogProb, Tilted

# Wong's palette, told apart with any colour vision (Nature Methods 8, 441, 2011).
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"

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


class Method(NamedTuple):
    """``drawn`` methods have a panel, all have a row."""

    name: str
    score: Score | None = None
    at: str = "denoised"
    drawn: bool = True


METHODS = [
    Method("exact samples"),
    Method("plain, xₜ (exact)", TemperedLogProb(), "x_t"),
    Method("plain, x̂₀", TemperedLogProb()),
    Method("plain, through x̂₀(xₜ)", TemperedLogProb(), "through_denoiser"),
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
    share: float
    offset: float
    spread: float


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
    classifier = GaussianMixtureClassifier(mixture, noise_aware=method.at == "x_t")
    guidance = ClassifierGuidance(classifier, method.score, at=method.at)
    return sampler(mixture, Gaussians(n), torch.full((n,), Y), guidance)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2E|a−b| − E|a−a'| − E|b−b'|, unbiased, of samples ``(n, 2, 1, 1)``: about 0 where both have one distribution."""

    def mean_distance(a: Tensor, b: Tensor) -> float:
        return float(torch.cdist(a.flatten(1), b.flatten(1)).mean(dtype=torch.float64))

    within = (mean_distance(v, v) * len(v) / (len(v) - 1) for v in (a, b))
    return 2 * mean_distance(a, b) - sum(within)


def grid() -> Tensor:
    """Centres of cells ``(CELLS², 2, 1, 1)``, x fastest."""
    v = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 * EXTENT - EXTENT
    return torch.cartesian_prod(v, v).flip(1)[:, :, None, None]


def nominal(method: Method, mixture: GaussianMixture) -> Tensor | None:
    """p(x)·exp(S(x)) ``(CELLS²,)``, normalised; None where a sample's score depends on others."""
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


def contours(axis: plt.Axes, cells: Tensor, masses: Sequence[float] = (0.9, 0.5), **style: object) -> None:
    """The smallest regions that hold so much of the mass."""
    ordered = cells.sort(descending=True).values
    levels = [float(ordered[(ordered.cumsum(0) < mass).sum()]) for mass in masses]
    v = (torch.arange(CELLS) + 0.5) / CELLS * 2 * EXTENT - EXTENT
    axis.contour(v, v, cells.view(CELLS, CELLS), levels=levels, **style)


def frame(axis: plt.Axes, mixture: GaussianMixture, title: str) -> None:
    for k, (x, y) in enumerate(mixture.means.tolist()):
        if k != Y:
            axis.text(x, y, str(k), fontsize=8, color="0.45", ha="center", va="center", zorder=1)
    axis.plot(*mixture.means[Y].tolist(), marker="*", color="white", mec=BLACK, mew=0.7, ms=8, zorder=5, ls="")
    axis.set(xlim=(-2.6, 2.6), ylim=(-2.1, 2.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=8.5, pad=3)
    for side in axis.spines.values():
        side.set_color("0.7")


def field(axis: plt.Axes, mixture: GaussianMixture, conditional: bool) -> None:
    """∇log p(x, y), or ∇log p(y | x), on a coarse grid of clean samples; arrows of length ∝ √|∇|."""
    v = torch.linspace(-2.4, 2.4, 17, dtype=torch.float64)
    x = torch.cartesian_prod(v, v)[:, :, None, None]
    g = gradients(x, mixture, conditional)
    g = g / g.norm(dim=1, keepdim=True).clamp(min=1e-9).sqrt()
    axis.quiver(
        *x.flatten(1).T.numpy(),
        *g.T.numpy(),
        color=VERMILLION if conditional else GREEN,
        angles="xy",
        scale=45,
        width=0.006,
    )


def gradients(x: Tensor, mixture: GaussianMixture, conditional: bool) -> Tensor:
    """``(n, 2)``: ∇log p(y | x), or ∇log p(x, y)."""
    x = x.double().clone().requires_grad_()
    score = TemperedLogProb(1.0, 1.0 if conditional else 0.0)(mixture.log_joint(x), torch.full((len(x),), Y))
    return torch.autograd.grad(score.sum(), x)[0].flatten(1)


def draw_figure(
    samples: dict[str, Tensor], measured: dict[str, Measured], mixture: GaussianMixture, path: Path
) -> None:
    drawn = [method for method in METHODS if method.drawn]
    own = mixture.log_joint(grid())[:, Y].softmax(0)
    figure = plt.figure(figsize=(7.2, 8.1))
    rows = figure.add_gridspec(4, 12, height_ratios=[1, 1, 1, 1.4], hspace=0.2, wspace=0.25)
    for place, method in enumerate(drawn):
        axis = figure.add_subplot(rows[place // 4, place % 4 * 3 : place % 4 * 3 + 3])
        x = samples[method.name].flatten(1)[:800]
        axis.scatter(*x.T, s=2.5, color=BLUE, alpha=0.45, lw=0, rasterized=True)
        contours(axis, own, colors=BLACK, linewidths=0.9)
        target = nominal(method, mixture)
        if target is not None:
            contours(axis, target, colors=VERMILLION, linewidths=1.1, linestyles="--")
        frame(axis, mixture, method.name)
        axis.text(0.03, 0.03, f"{max(measured[method.name].energy, 0):.3f}", transform=axis.transAxes, fontsize=7.5)
    for place, conditional in ((0, False), (1, True)):
        axis = figure.add_subplot(rows[3, place * 4 : place * 4 + 4])
        field(axis, mixture, conditional)
        contours(axis, own, colors=BLACK, linewidths=0.9)
        frame(axis, mixture, "conditional: ∇ log p(y | x)" if conditional else "joint: ∇ log p(x, y)")
    axis = figure.add_subplot(rows[3, 8:12])
    axis.set_axis_off()
    entries = [
        (Line2D([], [], color=BLACK, lw=0.9), "p(x | y), exact: 50, 90 % of mass"),
        (Line2D([], [], color=VERMILLION, lw=1.1, ls="--"), "p(x)·exp S(x), nominal"),
        (Line2D([], [], color=BLUE, marker="o", ms=3, ls=""), "samples"),
        (Line2D([], [], color="white", marker="*", mec=BLACK, mew=0.7, ms=8, ls=""), "μ of the class y"),
        (Line2D([], [], color="0.45", marker="$1$", ms=5, ls=""), "μ of another class"),
        (Line2D([], [], ls=""), "lower left: energy distance\nof the samples to p(x | y)"),
    ]
    axis.legend(
        *zip(*entries, strict=True),
        fontsize=8,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(-0.08, 0.5),
        labelspacing=0.9,
        handlelength=1.6,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def row(name: str, m: Measured) -> str:
    target = "–" if m.to_nominal is None else f"{m.to_nominal:.4f}"
    return f"| {name} | {m.energy:.4f} | {target} | {m.share:.3f} | {m.offset:.3f} | {m.spread:.2f} |"


def table(measured: dict[str, Measured]) -> list[str]:
    head = "| Guidance | Energy distance to p(x \\| y) | to the nominal target | Share of class y | Mean to μ_y | Variance / exact |"
    return [head, "|---|---|---|---|---|---|", *(row(name, m) for name, m in measured.items())]


def went(before: float, after: float, digits: int) -> str:
    verb = "raises" if after > before else "lowers"
    return f"{verb} {{}} from {before:.{digits}f} to {after:.{digits}f}"


def report(
    ddpm: dict[str, Measured], ddim: dict[str, Measured], floor: Tensor, mixture: GaussianMixture, n: int
) -> str:
    """The Markdown page; what it says of the numbers is put together from them."""
    names = [method.name for method in METHODS]
    exact, aware, plain, through = names[:4]
    bound = float(floor.mean() + 5 * floor.std())
    inexact = {name: m for name, m in ddpm.items() if name not in (exact, aware)}
    best, worst = min(inexact, key=lambda k: inexact[k].energy), max(inexact, key=lambda k: inexact[k].energy)
    weak = [m.name for m in METHODS if not m.drawn]
    closer = [name for name in inexact if name != plain and inexact[name].energy < inexact[plain].energy - bound]
    away = {
        name: float(
            ((gradients(x, mixture, name == "conditional") * (mixture.means[Y] - x.flatten(1))).sum(1) < 0)
            .double()
            .mean()
        )
        for x in [mixture.sample(n, Y, torch.Generator().manual_seed(SEED))]
        for name in ("joint", "conditional")
    }
    p, t = ddpm[plain], ddpm[through]
    reached = "no further than" if ddpm[aware].energy <= bound else "further than"
    beyond = [name for name, m in inexact.items() if m.share > ddpm[exact].share]
    narrower = [name for name, m in inexact.items() if m.spread < ddpm[exact].spread]
    far = [name for name in ddim if ddim[name].energy > bound]
    tau = [ddpm[name].spread for name in (plain, "τ₂ = 0.5", "τ₂ = 0")]
    shares = [ddpm[name].share for name in (plain, "τ₂ = 0.5", "τ₂ = 0")]
    lines = [
        "# What guidance does to a known density",
        "",
        "Written by `python docs/gaussian_mixture.py`; every number and every statement about one comes from that run.",
        "",
        f"An unconditional model of {len(MEANS)} overlapping Gaussians in two dimensions, whose denoiser and classifier are closed "
        f"forms, is guided to class {Y} with scale 1. Nothing is trained, so that what remains between samples and the exact "
        "density of the class, p(x | y), is what the method does. "
        f"{n} samples per row, DDPM with {STEPS} steps, the same noise in each row; where the name says nothing else, the classifier "
        "of clean samples sees x̂₀ and τ₁ = τ₂ = 1. The weights drawn are larger than the papers' (λ, α ≈ 0.1, t = −0.2), "
        "so that their effect shows; the last rows have the papers'.",
        "",
        "![Samples and densities of each method](images/gaussian_mixture.png)",
        "",
        "The nominal target is p(x)·exp S(x) of the clean sample, which guidance would sample if the score of every noise level were "
        f"that of the diffused target. Two exact sets of this size are {float(floor.mean()):.4f} ± {float(floor.std()):.4f} apart "
        f"(mean and deviation of {len(floor)} pairs); what follows takes only distances beyond {bound:.4f}, five deviations over "
        "the mean, as differences.",
        "",
        *table(ddpm),
        "",
        "What the numbers say:",
        "",
        f"- Plain guidance by the noise-aware posterior at xₜ is {reached} two exact sets are "
        f"({ddpm[aware].energy:.4f}). Every other method aims elsewhere, and its energy distance is a price to set against its gains.",
        f"- The exact classifier of clean samples at x̂₀ is not the gradient at xₜ: it {went(ddpm[exact].share, p.share, 3).format('the share of the class')}, "
        f"and {went(ddpm[exact].spread, p.spread, 2).format('the variance')} of the exact one. Carried through the denoiser, "
        f"it {went(p.energy, t.energy, 4).format('the energy distance')}.",
        f"- Lower marginal temperature: with τ₂ = 1, 0.5, 0 the variance is {', '.join(f'{v:.2f}' for v in tau)} of the exact one and "
        f"the share of the class {', '.join(f'{v:.3f}' for v in shares)}.",
        f"- Of the methods that are not exact, {best} is closest to the class ({inexact[best].energy:.4f}) and {worst} "
        f"furthest ({inexact[worst].energy:.4f}). "
        + (
            f"Closer than plain guidance at x̂₀ by more than {bound:.4f}: {'; '.join(closer)}."
            if closer
            else f"None is closer than plain guidance at x̂₀ by more than {bound:.4f}."
        ),
        f"- Precision for diversity: {len(beyond)} of those {len(inexact)} methods have a larger share of the class than exact samples, "
        f"{len(narrower)} a smaller variance.",
        f"- At the papers' weights the energy distance is between {min(ddpm[k].energy for k in weak):.4f} and "
        f"{max(ddpm[k].energy for k in weak):.4f}, against {p.energy:.4f} of plain guidance at x̂₀.",
        f"- The conditional gradient ∇log p(y | x) leads away from μ_y at {100 * away['conditional']:.1f} % of exact samples of the "
        f"class, the joint one at {100 * away['joint']:.1f} % (lowest panels; Proposition 4.2 of arXiv 2310.11311).",
        "",
        f"The same with DDIM, {STEPS} steps, whose deterministic path never forgets what guidance did to it at high noise: ",
        "",
        *table(ddim),
        "",
        f"Further than {bound:.4f} from the class: {'; '.join(far) or 'none'}. Scales that suit DDPM need not suit DDIM.",
        "",
    ]
    return "\n".join(lines)


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
    draw_figure(samples, ddpm, mixture, arguments.output / "images" / "gaussian_mixture.png")
    (arguments.output / "gaussian_mixture.md").write_text(report(ddpm, ddim, floor, mixture, arguments.n))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
