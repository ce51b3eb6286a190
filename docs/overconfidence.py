"""What over-confidence does to the guidance gradient, and what fine-tuning with Smooth ECE does about it.

Writes ``overconfidence.md``, ``images/overconfidence.png`` and ``images/overconfidence_beta.png``:
``python docs/overconfidence.py [--output docs]``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import Tensor, nn

from calib_guidance.classifiers import Classifier
from calib_guidance.classifiers.gaussian_mixture import GaussianMixtureClassifier
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.metrics import CalibrationError
from calib_guidance.plots import COLORS
from calib_guidance.samplers import DDPM, StepRecord
from calib_guidance.training import binned_smooth_ece, smooth_ece

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, _ = COLORS

# Two classes two standard deviations apart, in so many dimensions that few points can be told apart by chance.
DIMENSIONS, WEIGHTS = 16, (0.75, 0.25)
LIKELY, OTHER = 0, 1
FEW, FRESH, HELD_OUT = 64, 4096, 20_000
MEMORIZING, BUDGETS, SEEDS = (25, 100, 900), (100, 300), 6
SAMPLES, STEPS, EARLY = 400, 50, 667

Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(NamedTuple):
    """What is added to cross-entropy: ``weight`` times ``loss`` with ``beta``."""

    name: str
    colour: str
    weight: float = 0.0
    loss: Callable[..., Tensor] | None = None
    beta: float = 0.0

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        return loss if self.loss is None else loss + self.weight * self.loss(logits, y, self.beta)


OBJECTIVES = [
    Objective("cross-entropy", BLUE),
    Objective("+ 1·per sample, β = 0.01", PURPLE, 1.0, smooth_ece, 0.01),
    Objective("+ 5·per sample, β = 1", ORANGE, 5.0, smooth_ece, 1.0),
    Objective("+ 5·binned, β = 0.01", GREEN, 5.0, binned_smooth_ece, 0.01),
]
START, EXACT = "over-confident", "exact posterior"


class Measured(NamedTuple):
    """ECE, accuracy and cross-entropy on held-out samples; of guided sampling, from noise to sample, ECE_t ``(STEPS,)`` and the
    mean gradient norm of each class ``(2, STEPS)``."""

    ece: float
    accuracy: float
    nll: float
    ece_t: Tensor
    norms: Tensor


def early(values: Tensor) -> float:
    """Mean of values ``(STEPS,)`` over the steps t ≥ EARLY."""
    return float(values[torch.tensor(steps()) >= EARLY].mean())


Run = dict[tuple[str, int], Measured]  # by name and steps of fine-tuning
Runs = dict[tuple[int, int], Run]  # by seed and steps of memorizing


class MLP(Classifier):
    """Two hidden layers, smooth, so that the gradient is too."""

    num_classes = 2

    def __init__(self, width: int = 64):
        super().__init__()
        hidden = [nn.Linear(DIMENSIONS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.network = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, self.num_classes))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.network(x)


class Gaussians:
    """The same noise for every classifier."""

    def __init__(self, n: int):
        self.n, self.generator = n, torch.Generator().manual_seed(0)

    def __call__(self) -> Tensor:
        return torch.randn(self.n, DIMENSIONS, 1, 1, generator=self.generator)


def two_classes() -> GaussianMixture:
    """Unit variances, means at ∓1 on the first axis; the best classifier is right 87 % of the time, and knows where not."""
    mean = [1.0] + [0.0] * (DIMENSIONS - 1)
    return GaussianMixture([[-v for v in mean], mean], [1.0, 1.0], WEIGHTS)


def steps() -> list[int]:
    """t of each step, from noise to sample."""
    return two_classes().schedule.respace(str(STEPS)).timesteps.tolist()[::-1]


def labelled(mixture: GaussianMixture, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples ``(n, D, 1, 1)`` and their classes ``(n,)``."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(mixture.log_weights.exp(), n, replacement=True, generator=generator)
    of_class = torch.stack([mixture.sample(n, k, generator) for k in range(mixture.num_components)])
    return of_class[y, torch.arange(n)], y


def train(
    classifier: MLP, x: Tensor, y: Tensor, loss: Loss, budgets: Sequence[int], rate: float, batch: int, seed: int
) -> list[MLP]:
    """Copies of the classifier after so many steps of AdamW on random batches; the classifier itself stays."""
    classifier = copy.deepcopy(classifier).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=0.0)
    found = []
    for step in range(1, max(budgets) + 1):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss(classifier(x[rows]), y[rows]).backward()
        optimizer.step()
        if step in budgets:
            found.append(copy.deepcopy(classifier))
    return found


def measure(classifier: Classifier, mixture: GaussianMixture, n: int) -> Measured:
    """On held-out samples, and while it guides ``n`` samples at scale 1, classes in the proportions of the mixture."""
    y = (torch.arange(n) >= WEIGHTS[LIKELY] * n).long()
    calibration, norms = CalibrationError(num_levels=STEPS), torch.zeros(2, STEPS)

    def observe(record: StepRecord) -> None:
        calibration.update(record.guided.aux.logits, record.y, record.i)
        norm = record.guided.aux.gradient.flatten(1).norm(dim=1)
        for k in range(2):
            norms[k, STEPS - 1 - record.i] = norm[record.y == k].mean()

    DDPM(STEPS)(mixture, Gaussians(n), y, ClassifierGuidance(classifier), [observe])
    x, y = labelled(mixture, HELD_OUT, seed=10**6)
    ece = CalibrationError()
    with torch.no_grad():
        logits = classifier(x)
    ece.update(logits, y)
    accuracy, nll = float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))
    return Measured(float(ece.compute().overall), accuracy, nll, calibration.compute().by_level.flip(0), norms)


def run(seed: int, memorizing: int, n: int = SAMPLES, objectives: Sequence[Objective] = OBJECTIVES) -> Run:
    """Make a classifier over-confident, fine-tune it with each objective from there, measure each.

    Args:
        seed: of weights, data and batches.
        memorizing: steps of cross-entropy on FEW samples, always the same ones.
        n: samples to guide.
        objectives: of fine-tuning, on FRESH samples.
    """
    mixture = two_classes()
    torch.manual_seed(seed)
    few, fresh = labelled(mixture, FEW, 2 * seed), labelled(mixture, FRESH, 2 * seed + 1)
    (start,) = train(MLP(), *few, F.cross_entropy, [memorizing], 3e-3, FEW, seed)
    found = {(START, 0): measure(start, mixture, n)}
    for objective in objectives:
        tuned = train(start, *fresh, objective, BUDGETS, 1e-3, 256, seed)
        found |= {(objective.name, b): measure(c, mixture, n) for b, c in zip(BUDGETS, tuned, strict=True)}
    return found


def least_loss(q: Tensor, beta: float, n: int, weight: float | None = None) -> Tensor:
    """Confidence at which the expected loss is least, where each prediction is right with probability q.

    Args:
        q: ``(Q,)`` in [½, 1].
        beta: of the Smooth ECE.
        n: samples in the bin; 1 is the loss per sample.
        weight: λ beside cross-entropy; None leaves cross-entropy out.

    Returns:
        ``(Q,)`` in [½, 1).
    """
    p = torch.linspace(0.5, 1, 5001, dtype=torch.float64)[:-1, None]
    right = torch.arange(n + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(n, q.double()[:, None]).log_prob(right).exp()
    loss = ((p - right / n).square() + beta).sqrt() @ chance.T
    if weight is not None:
        loss = weight * loss - q * p.log() - (1 - q) * (1 - p).log()
    return p[loss.argmin(0), 0]


def draw_plot(runs: Runs, exact: Measured, path: Path) -> None:
    hardest = at(runs, max(MEMORIZING))
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.6))
    shown = [(START, 0, VERMILION), *((o.name, BUDGETS[-1], o.colour) for o in OBJECTIVES if o.beta != 1.0)]
    for axis, y, title in zip(axes[0], (LIKELY, OTHER), ("the likelier class", "the other class"), strict=True):
        for name, budget, colour in shown:
            norms = torch.stack([found[name, budget].norms[y] for found in hardest])
            axis.plot(steps(), norms.median(0).values, color=colour, lw=1.3)
            if name in (START, OBJECTIVES[0].name):
                axis.fill_between(steps(), norms.amin(0), norms.amax(0), color=colour, alpha=0.18, lw=0)
        axis.plot(steps(), exact.norms[y], color=BLACK, lw=1.2, ls="--")
        axis.axvspan(EARLY, 1000, color="0.94", zorder=0, lw=0)
        axis.set(yscale="log", ylim=(1e-4, 20), xlim=(1000, 0), xlabel="diffusion step t  (noise → sample)")
        axis.set_title(f"guided to {title}", fontsize=9)
    axes[0, 0].set_ylabel(r"$\|\nabla \log p(y\,|\,\hat{x}_0)\|$")

    axis = axes[1, 0]
    colours = {START: VERMILION, **{o.name: o.colour for o in OBJECTIVES}}
    for row, (name, colour) in enumerate(colours.items()):
        for budget, marker, shift in [(0, "o", 0)] if name == START else zip(BUDGETS, "^o", (-0.16, 0.16), strict=True):
            values = torch.tensor([found[name, budget].ece for found in hardest])
            axis.scatter(values, torch.full_like(values, row + shift), s=9, color=colour, alpha=0.5, lw=0)
            axis.scatter(values.mean(), row + shift, s=36, color=colour, marker=marker, ec="white", lw=0.6, zorder=3)
    axis.set_yticks(range(len(colours)), colours, fontsize=7.5)
    axis.invert_yaxis()
    axis.set(xlim=(0, None), xlabel="ECE on held-out samples")
    axis.set_title(f"after ▲ {BUDGETS[0]} and ● {BUDGETS[1]} steps", fontsize=9)

    axis = axes[1, 1]
    for y, marker in ((LIKELY, "o"), (OTHER, "s")):
        for objective in OBJECTIVES:
            fall, change = changes(runs, y, [objective])
            face = objective.colour if y == LIKELY else "none"
            axis.scatter(fall, change.exp(), s=11, marker=marker, fc=face, ec=objective.colour, lw=0.6, alpha=0.7)
    axis.axhline(1, color="0.6", lw=0.8)
    axis.set(yscale="log", xlabel="fall of the ECE", ylabel="early norm, after / before")
    axis.set_title("● likelier class   □ other class", fontsize=9)

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7.5)
        axis.xaxis.label.set_size(8.5)
        axis.yaxis.label.set_size(8.5)
    entries = [(Line2D([], [], color=colour, lw=1.5), name) for name, colour in colours.items()]
    entries.append((Line2D([], [], color=BLACK, lw=1.2, ls="--"), EXACT))
    figure.tight_layout(rect=(0, 0.07, 1, 1), h_pad=1.4, w_pad=1.4)
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0), "ncol": 3}
    figure.legend(*zip(*entries, strict=True), fontsize=8, frameon=False, handlelength=1.5, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def draw_minimizers(path: Path) -> None:
    q = torch.linspace(0.5, 1, 201)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.1), sharey=True)
    panels = [
        ("per sample", [(f"β = {beta:g}", beta, 1) for beta in (1e-4, 1e-2, 1e-1, 1.0)]),
        ("binned, β = 0.01", [(f"{n} samples in the bin", 0.01, n) for n in (2, 4, 8, 32)]),
    ]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        axis.plot(q, q, color=BLACK, lw=1, ls="--", label="calibrated")
        for colour, (label, beta, n) in zip((VERMILION, PURPLE, SKY, BLUE), lines, strict=True):
            axis.plot(q, least_loss(q, beta, n), color=colour, lw=1.3, label=label)
        axis.set(xlabel="share q of predictions that are right", xlim=(0.5, 1), ylim=(0.5, 1.005), title=title)
        axis.title.set_fontsize(9.5)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("confidence of least loss")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def at(runs: Runs, memorizing: int) -> list[Run]:
    """Runs of so many steps of memorizing, one a seed."""
    return [found for (_, steps), found in runs.items() if steps == memorizing]


def changes(runs: Runs, y: int, objectives: Sequence[Objective] = OBJECTIVES) -> tuple[Tensor, Tensor]:
    """Of each run and objective, at the longest budget: fall of the ECE, and log of the early norm's ratio after to before."""
    pairs = [(found[START, 0], found[o.name, BUDGETS[-1]]) for found in runs.values() for o in objectives]
    falls = torch.tensor([before.ece - after.ece for before, after in pairs])
    return falls, torch.tensor([early(after.norms[y]) / early(before.norms[y]) for before, after in pairs]).log()


def expected_excess(mixture: GaussianMixture, objective: Objective) -> float:
    """By how much a classifier that has reached the least expected loss per sample everywhere is over-confident."""
    x, _ = labelled(mixture, HELD_OUT, seed=10**6)
    q = mixture.log_joint(x).softmax(1).amax(1)
    grid = torch.linspace(0.5, 1, 501, dtype=torch.float64)
    found = least_loss(grid, objective.beta, 1, objective.weight)
    return float((found[(q * 1000 - 500).round().long()] - q).mean())


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    v = torch.tensor(values, dtype=torch.float64)
    return f"{float(v.mean()):.{digits}f} ± {float(v.std()):.{digits}f}"


def span(values: Sequence[float], digits: int = 3) -> str:
    """Median (least … most)."""
    v = torch.tensor(values, dtype=torch.float64)
    return f"{float(v.quantile(0.5)):.{digits}f} ({float(v.min()):.{digits}f} … {float(v.max()):.{digits}f})"


def lines(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body))


def table(runs: Sequence[Run], exact: Measured) -> str:
    head = ["classifier", "steps", "ECE", "accuracy", "cross-entropy", "integral ECE", "early norm, likelier class"]
    rows = [[*head, "early norm, other class"]]
    for name, budget in runs[0]:
        found = [run[name, budget] for run in runs]
        cells = [cell([getattr(m, field) for m in found]) for field in ("ece", "accuracy", "nll")]
        cells.append(cell([float(m.ece_t.mean()) for m in found]))
        cells += [span([early(m.norms[y]) for m in found]) for y in (LIKELY, OTHER)]
        rows.append([name, str(budget or "–"), *cells])
    values = [exact.ece, exact.accuracy, exact.nll, float(exact.ece_t.mean())]
    norms = [f"{early(exact.norms[y]):.3f}" for y in (LIKELY, OTHER)]
    return lines([*rows, [EXACT, "–", *(f"{v:.3f}" for v in values), *norms]])


def minimizers() -> str:
    """Confidence of least expected loss for some q."""
    q = torch.tensor([0.55, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    kinds = [(f"per sample, β = {beta:g}", beta, 1, None) for beta in (1e-4, 1e-2, 1e-1, 1.0)]
    kinds += [(f"cross-entropy + {w:g}·per sample, β = {beta:g}", beta, 1, w) for w, beta in ((1.0, 0.01), (5.0, 1.0))]
    kinds += [(f"binned, β = 0.01, {n} in the bin", 0.01, n, None) for n in (2, 8, 32)]
    rows = [["confidence of least expected loss", *(f"q = {v:g}" for v in q.tolist())]]
    return lines(rows + [[name, *(f"{p:.3f}" for p in least_loss(q, *kind).tolist())] for name, *kind in kinds])


def report(runs: Runs, exact: Measured, mixture: GaussianMixture) -> str:
    """The Markdown page, with the numbers that were found."""
    hardest = at(runs, max(MEMORIZING))
    plain, sharp, wide, binned = (objective.name for objective in OBJECTIVES)
    short, long = BUDGETS

    def mean(name: str, budget: int, field: str = "ece") -> str:
        return f"{sum(getattr(found[name, budget], field) for found in hardest) / len(hardest):.3f}"

    def norm(name: str, budget: int, y: int) -> str:
        return f"{float(torch.tensor([early(found[name, budget].norms[y]) for found in hardest]).quantile(0.5)):.2f}"

    def lower(name: str, budget: int, runs: Sequence[Run]) -> str:
        return f"{sum(found[name, budget].ece < found[plain, budget].ece for found in runs)} of {len(runs)}"

    def up(y: int, runs: Runs) -> str:
        changed = changes(runs, y)[1]
        return f"{int((changed > 0).sum())} of {len(changed)}"

    def r(y: int) -> str:
        return f"{float(torch.corrcoef(torch.stack(changes(runs, y)))[0, 1]):.2f}"

    integral = {key: sum(float(found[key].ece_t.mean()) for found in hardest) / len(hardest) for key in hardest[0]}
    tuned = [mean(objective.name, long) for objective in OBJECTIVES]
    strongest = {key: found for key, found in runs.items() if key[1] == max(MEMORIZING)}
    findings = [
        "**Over-confidence weakens guidance to the class that the classifier predicts, and only to that class.** There "
        f"the early norm is {norm(START, 0, LIKELY)} where the exact posterior's is {early(exact.norms[LIKELY]):.2f}; "
        "to the other "
        f"class it is {norm(START, 0, OTHER)} where {early(exact.norms[OTHER]):.2f} would be right. With two classes "
        "∇log p(y | x) = (1 − p(y | x))·∇(f_y − f_other), so at one point the norms to both classes add up to that of the "
        "logits' difference, whatever the confidence: steep logits cannot lower both.",
        f"**Calibration brings both norms near the exact ones.** After {long} steps the ECE is between {min(tuned)} and "
        f"{max(tuned)} "
        f"instead of {mean(START, 0)}, whatever the objective; the early norms with cross-entropy are "
        f"{norm(plain, long, LIKELY)} and {norm(plain, long, OTHER)}. The norm to the likelier class rises in "
        f"{up(LIKELY, strongest)} pairs of before and after, that to the other class in {up(OTHER, strongest)}. "
        f"With the weaker over-confidence of fewer steps of memorizing "
        f"included it is {up(LIKELY, runs)} and {up(OTHER, runs)}, and the fall of the ECE correlates with the log of the "
        f"norm's ratio, r = {r(LIKELY)} and {r(OTHER)} (lower right). The ECE is a mean over all samples and the early norm "
        "depends on one place, the mean of the samples; so neither determines the other.",
        "**Cross-entropy alone is enough.** It is a proper scoring rule: on fresh samples its minimum is at p(y | x) "
        f"itself, so a calibration term has nothing left to correct. After {long} steps the ECE is {mean(plain, long)} "
        "with it and "
        f"{mean(binned, long)} with binned Smooth ECE beside it, which is lower in {lower(binned, long, hardest)} seeds.",
        f"**Before cross-entropy has converged,** after {short} steps, the ECE is {mean(binned, short)} with binned Smooth ECE "
        f"against {mean(plain, short)}, lower in {lower(binned, short, hardest)} seeds, at an accuracy of "
        f"{mean(binned, short, 'accuracy')} against {mean(plain, short, 'accuracy')}.",
        f"**Smooth ECE per sample with β = 0.01** takes the ECE to {mean(sharp, long)}, lower than cross-entropy alone in "
        f"{lower(sharp, long, hardest)} seeds. Its minimum is not at the accuracy (see below): with cross-entropy and λ "
        f"= 1, a classifier at the minimum is over-confident by {expected_excess(mixture, OBJECTIVES[1]):.3f} on these "
        f"samples. With β = 1 and λ = 5 the ECE is {mean(wide, long)}.",
        f"**The integral ECE measures something else.** It goes from {integral[START, 0]:.3f} to {integral[plain, long]:.3f} "
        f"with cross-entropy, and the exact posterior's is {float(exact.ece_t.mean()):.3f}: it compares confidence with "
        f"the class that is being sampled, and strong guidance soon makes that class likely. The lowest value does not "
        f"mean the best calibration.",
    ]
    paragraphs = [
        "# What over-confidence does to the guidance gradient",
        "Does guidance change with the ECE? arXiv 2511.05844 leaves this check open. On a task with two classes, a "
        "classifier is made over-confident on purpose and fine-tuned with Smooth ECE. The diffusion model and the "
        "exact posterior are closed forms, so errors of a diffusion model play no role.",
        f"Two normal classes in {DIMENSIONS} dimensions, two standard deviations apart, with {WEIGHTS[LIKELY]:.0%} and "
        f"{WEIGHTS[OTHER]:.0%} of the samples; the exact posterior is right for {exact.accuracy:.0%}. A small network (SiLU, two "
        f"hidden layers) is trained on {FEW} samples for {max(MEMORIZING)} steps, until it has memorized them, and fine-tuned "
        f"from there on {FRESH} fresh ones with each objective. The ECE has 15 bins and {HELD_OUT} held-out samples. Each "
        f"classifier guides {SAMPLES} samples of DDPM with {STEPS} steps through x̂₀, at scale 1, their classes in the "
        f"proportions of the data. Early is t ≥ {EARLY}, where x̂₀ is still near the mean of all samples. "
        f"Over {len(hardest)} seeds: mean ± standard deviation, for norms median (least … most). "
        "`python docs/overconfidence.py` writes this page.",
        "![Gradient norms, ECE, and how they change together](images/overconfidence.png)",
        "Above: gradient norm, median over seeds, bands from least to most; early steps are shaded. Lower left: each seed and "
        f"their mean. Lower right: each seed, objective and strength of over-confidence "
        f"({', '.join(map(str, MEMORIZING))} steps of memorizing), after {long} steps of fine-tuning.",
        table(hardest, exact),
        "\n".join(f"- {finding}" for finding in findings),
        "## Choosing β",
        "Smooth ECE per sample is a smooth |p̂ − a|, and an absolute value is least at the median of a, not at its mean. Of "
        "predictions that are right with probability q > ½, the expected loss q·√((1 − p)² + β) + (1 − q)·√(p² + β) is least "
        "at p ≈ 1 − √β·(1 − q)/√(2q − 1) for small β, and at p ≈ q + q(1 − q)(2q − 1)/(2β) for large β, where the root becomes "
        "a square. A small β thus asks for more confidence wherever accuracy is above one half, and cross-entropy beside it "
        "holds it back. Binned Smooth ECE is least at q when its bins are full, and is the loss per sample when a bin has one "
        "sample.",
        "![Confidence of least loss over accuracy](images/overconfidence_beta.png)",
        minimizers(),
        "- Per sample: β of 1 or more, or λ well below 1 beside cross-entropy. Where a classifier of many classes is right less "
        "than half of the time at some confidence, the same pull goes down instead of up.\n"
        "- Binned: β = 0.01 with about 8 samples or more in the bins that matter; on many devices the bins are those of all of "
        "them. Below that, its least value swings around q (right panel). Labels scatter, so that even a calibrated bin of n "
        "samples has a mean gap of about √(2q(1 − q)/(πn)), 0.13 for n = 8 and q = 0.7: its value does not measure the ECE.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What over-confidence does to the guidance gradient.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page and of images/")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds, at least 2")
    arguments = parser.parse_args()
    mixture = two_classes()
    exact = measure(GaussianMixtureClassifier(mixture), mixture, SAMPLES)
    runs = {(seed, memorizing): run(seed, memorizing) for memorizing in MEMORIZING for seed in range(arguments.seeds)}
    draw_plot(runs, exact, arguments.output / "images" / "overconfidence.png")
    draw_minimizers(arguments.output / "images" / "overconfidence_beta.png")
    (arguments.output / "overconfidence.md").write_text(report(runs, exact, mixture))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
