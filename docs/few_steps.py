"""Digits against NFE: the tables and the plot of few_steps.md.

    python docs/few_steps.py

Each setting is measured once and kept in ``few_steps.json``: a stopped run resumes, a new setting is one run more, and where all
are there the page is only drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import nn
from tqdm import tqdm

from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.data import DigitImages
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.evaluation import ClassifierFeatures
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
from calib_guidance.metrics import frechet_distance, mean_and_covariance, precision_recall
from calib_guidance.networks import SmallResNet, UNet
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, Sampler, UniPC
from calib_guidance.scores import DivergenceRegularized

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EVALUATIONS = (5, 10, 15, 25, 50, 250)
MEASURES = ("Fréchet ↓", "precision ↑", "recall ↑", "accuracy ↑")
# The standard deviation of the digits' leading principal components, which the ODE's guidance goes by.
LEADING = 1.6
SDE, TWO_M = "DPM-Solver++ 2M SDE", "DPM-Solver++ 2M"
SAMPLERS = ("DDPM", SDE, "DDIM", TWO_M, "UniPC", "Heun")
# Okabe & Ito's colors, which color-blind readers tell apart.
STYLES = dict(
    zip(
        SAMPLERS,
        (
            ("#000000", "o", "-"),
            ("#D55E00", "s", "-"),
            ("#0072B2", "^", "--"),
            ("#009E73", "D", "--"),
            ("#CC79A7", "v", ":"),
            ("#E69F00", "P", "-."),
        ),
        strict=True,
    )
)


class Setting(NamedTuple):
    """One row's sampler and guidance at one number of evaluations."""

    sampler: str
    evaluations: int
    guided: bool = True
    term: str = "ddpm_equivalent"
    schedule: tuple[tuple[str, Any], ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()  # further options of the sampler; not for DDIM and Heun

    def build(self) -> Sampler:
        n = self.evaluations
        if self.sampler == "DDPM":
            return DDPM(n, **dict(self.sampling))
        if self.sampler == "Heun":  # two evaluations a step, and one at the last
            return Heun((n + 1) // 2, clip_denoised=True)
        if self.sampler == "DDIM":
            return DDIM(f"ddim{n}", guidance_scaling=self.term, data_std=LEADING)
        if self.sampler == SDE:
            return DPMSolver(n, sde=True, guidance_scaling=self.term, **dict(self.sampling))
        kind = UniPC if self.sampler == "UniPC" else DPMSolver
        return kind(n, guidance_scaling=self.term, data_std=LEADING, **dict(self.sampling))


def settings() -> Iterator[Setting]:
    """Those of both tables and the plot, the short ones first."""
    for n in EVALUATIONS:
        for name in SAMPLERS:
            yield Setting(name, n)
            yield Setting(name, n, guided=False)
    yield from OTHERS.values()


UNCLIPPED = (("clip_denoised", False),)
OTHERS = {
    **{f"{name}, guidance as part of x̂0": Setting(name, 25, term="score") for name in (SDE, "DDIM", TWO_M, "UniPC")},
    **{
        f"{name}, 10, guidance as part of x̂0": Setting(name, 10, term="score") for name in (SDE, "DDIM", TWO_M, "UniPC")
    },
    f"{SDE}, guided at σ in [0.1, 10]": Setting(SDE, 25, schedule=(("sigma_interval", (0.1, 10.0)),)),
    f"{SDE}, guided at σ in [0.1, 3]": Setting(SDE, 25, schedule=(("sigma_interval", (0.1, 3.0)),)),
    f"{SDE}, guided every 2nd step": Setting(SDE, 25, schedule=(("every", 2),)),
    f"{SDE}, guided every 3rd step": Setting(SDE, 25, schedule=(("every", 3),)),
    **{
        f"DDPM, {variance.replace('_', ' ')} variance": Setting("DDPM", 25, sampling=(("variance", variance),))
        for variance in ("fixed_small", "fixed_large")
    },
    **{f"{name}, x̂0 not clipped": Setting(name, 25, sampling=UNCLIPPED) for name in ("DDPM", SDE, TWO_M)},
    f"{TWO_M}, first order": Setting(TWO_M, 25, sampling=(("order", 1),)),
    f"{SDE}, first order": Setting(SDE, 25, sampling=(("order", 1),)),
}


# The seeds of the tables are those on which things were tried; what is claimed is measured again on others.
FRESH_SEEDS = range(3, 15)
REFERENCE = Setting("DDPM", 250)
CLAIMED = {
    "DDPM, 250": REFERENCE,
    f"{SDE}, 250": Setting(SDE, 250),
    f"{SDE}, 25": Setting(SDE, 25),
    f"{SDE}, 25, guidance as part of x̂0": Setting(SDE, 25, term="score"),
    f"{SDE}, 15": Setting(SDE, 15),
    f"{SDE}, 10": Setting(SDE, 10),
    "DDPM, 25": Setting("DDPM", 25),
    f"{TWO_M}, 25": Setting(TWO_M, 25),
}


@cache
def models() -> tuple[ADMDenoiser, nn.Module, ClassifierFeatures, torch.Tensor]:
    """Denoiser, classifier that guides, evaluation classifier, and its features of the held-out digits."""
    network = UNet(
        8, 1, 32, 2, 1, (2,), channel_mult=(1, 2), num_classes=10, num_head_channels=32, use_scale_shift_norm=True,
        resblock_updown=True,
    )  # fmt: skip
    folder = "checkpoints/digits"
    denoiser = ADMDenoiser(
        network, f"{folder}/diffusion.safetensors", "cosine", prediction="v", class_conditional=False
    )
    guides = OffTheShelfClassifier(
        SmallResNet(10, 1, [32, 64, 64], 1), 10, f"{folder}/classifier.safetensors", softplus_beta=3.0
    )
    eval_classifier = OffTheShelfClassifier(
        SmallResNet(10, 1, [48, 96, 48], 2), 10, f"{folder}/eval_classifier.safetensors"
    )
    features, digits = ClassifierFeatures(eval_classifier).eval(), DigitImages(split="heldout")
    with torch.no_grad():
        reference = features(to_uint8(torch.stack([d["image"] for d in digits]), "truncate")).pool
    return denoiser.eval(), guides, features, reference


def measure(setting: Setting, seed: int, n: int) -> list[float]:
    """The ``MEASURES`` of ``n`` class-balanced digits."""
    torch.set_num_threads(1)
    denoiser, classifier, eval_classifier, reference = models()
    score = DivergenceRegularized("js", alpha=0.1, epsilon=0.1, tau1=1.0, tau2=0.8)
    guidance = ClassifierGuidance(classifier, score, schedule=GuidanceSchedule(**dict(setting.schedule)))
    sampler, guidance = setting.build(), guidance if setting.guided else None
    sampler.check(denoiser, guidance)
    y, images = torch.arange(n) % 10, []
    for index in torch.arange(n).split(100):
        noise = SampleStreams([seed] * len(index), index.tolist(), denoiser.image_shape)
        images.append(sampler(denoiser, noise, y[index], guidance))
    with torch.no_grad():
        features, _, logits = eval_classifier(to_uint8(torch.cat(images), "truncate"))
    distance = frechet_distance(*mean_and_covariance(reference), *mean_and_covariance(features))
    right = (logits.argmax(1) == y).float().mean()
    return [float(v) for v in (distance, *precision_recall(reference, features), right)]


def key(setting: Setting, seed: int, n: int) -> str:
    chosen = setting if setting.sampling else setting[:-1]
    return json.dumps([*chosen, LEADING, seed, n], ensure_ascii=False)


def cells(found: dict[str, list[float]], setting: Setting, seeds: list[int], n: int, measures: range) -> list[str]:
    """Mean ± standard deviation over the seeds that are measured."""
    rows = [found[k] for seed in seeds if (k := key(setting, seed, n)) in found]
    if not rows:
        return ["–"] * len(measures)
    texts = []
    for m in measures:
        values, digits = [row[m] for row in rows], 3 if m else 2
        std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.{digits}f}{std}")
    return texts


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(found: dict[str, list[float]], seeds: list[int], fresh: list[int], n: int) -> dict[str, str]:
    """Markdown by mark: ``few-steps`` has the Fréchet distance alone. Differences are of pairs of one seed ± s.e."""
    small, full = [], []
    for guided in (True, False):
        word = "guided" if guided else "unguided"
        small.append([f"**{word}**", *[""] * len(EVALUATIONS)])
        for name in SAMPLERS:
            each = [Setting(name, e, guided) for e in EVALUATIONS]
            small.append([name, *(cells(found, s, seeds, n, range(1))[0] for s in each)])
            full += [[name, word, str(s.evaluations), *cells(found, s, seeds, n, range(4))] for s in each]
    others = [[name, *cells(found, s, seeds, n, range(4))] for name, s in OTHERS.items()]
    reference = {seed: row for seed in fresh if (row := found.get(key(REFERENCE, seed, n)))}
    claimed = []
    for name, setting in CLAIMED.items():
        apart = [row[0] - reference[seed][0] for seed in reference if (row := found.get(key(setting, seed, n)))]
        further = len(apart) > 1 and setting != REFERENCE
        text = f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}" if further else "–"
        claimed.append([name, *cells(found, setting, fresh, n, range(4)), text])
    return {
        "few-steps-fresh": markdown(["sampler, NFE", *MEASURES, "Fréchet, less that of DDPM's 250"], claimed),
        "few-steps": markdown(["Fréchet ↓ by NFE", *map(str, EVALUATIONS)], small),
        "few-steps-others": markdown(["25 evaluations, or as named", *MEASURES], others),
        "few-steps-all": markdown(["sampler", "guidance", "evaluations", *MEASURES], full),
    }


def insert(path: Path, texts: dict[str, str]) -> None:
    """Put each table between its marks, where the page has them."""
    page = path.read_text()
    for mark, text in texts.items():
        before, opening, rest = page.partition(f"<!-- {mark} -->")
        _, closing, after = rest.partition(f"<!-- /{mark} -->")
        if closing:
            page = f"{before}{opening}\n{text}\n{closing}{after}"
    path.write_text(page)


def draw(found: dict[str, list[float]], seeds: list[int], n: int, path: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.2), sharex=True, layout="constrained")
    for row, guided in zip(axes, (True, False), strict=True):
        for m, (axis, measure) in enumerate(zip(row, MEASURES, strict=True)):
            for name, (colour, marker, line) in STYLES.items():
                points = []
                for e in EVALUATIONS:
                    keys = [key(Setting(name, e, guided), seed, n) for seed in seeds]
                    if values := [found[k][m] for k in keys if k in found]:
                        points.append(
                            (e, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
                        )
                if not points:
                    continue
                x, mean, spread = (torch.tensor(column) for column in zip(*points, strict=True))
                axis.plot(x, mean, color=colour, marker=marker, ls=line, ms=4, lw=1.3, label=name)
                axis.fill_between(x, (mean - spread).clamp(min=1e-3), mean + spread, color=colour, alpha=0.15, lw=0)
            axis.set(xscale="log", title=f"{measure}, {'guided' if guided else 'unguided'}", xlim=(4.5, 280))
            axis.set_xticks(EVALUATIONS, [str(e) for e in EVALUATIONS])
            axis.minorticks_off()
            axis.grid(alpha=0.3, lw=0.5)
            if m == 0:
                ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
                axis.set(yscale="log", ylim=(0.15, 70))
                axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.minorticks_off()
            else:
                axis.set(ylim=(0, 1.02))
    figure.supxlabel("NFE", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits against NFE.")
    parser.add_argument(
        "--pages", type=Path, nargs="*", default=[Path("docs/few_steps.md")], help="pages with the marks"
    )
    parser.add_argument("--plot", type=Path, default=Path("docs/images/few_steps.png"))
    parser.add_argument("--cache", type=Path, default=Path("docs/few_steps.json"), help="what is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh-seeds", type=int, nargs="*", default=list(FRESH_SEEDS), help="of what is claimed")
    parser.add_argument("--most", type=int, default=max(EVALUATIONS), help="skip settings with a larger NFE")
    parser.add_argument("-n", type=int, default=500, help="digits per setting")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    found = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    wanted = sorted((s for s in settings() if s.evaluations <= options.most), key=lambda s: s.evaluations)
    todo = [(s, seed) for s in wanted for seed in options.seeds]
    todo += [(s, seed) for s in CLAIMED.values() for seed in options.fresh_seeds if s.evaluations <= options.most]
    todo = [(s, seed) for s, seed in todo if key(s, seed, options.n) not in found]
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of each worker, which have a core each
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(measure, s, seed, options.n): key(s, seed, options.n) for s, seed in todo}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="setting"):
            found[jobs[job]] = job.result()
            partial = options.cache.with_suffix(".part")
            partial.write_text(json.dumps(found, indent=0, ensure_ascii=False))
            partial.replace(options.cache)
    texts = tables(found, options.seeds, options.fresh_seeds, options.n)
    for page in options.pages:
        insert(page, texts)
    draw(found, options.seeds, options.n, options.plot)
    print(*(texts[name] for name in ("few-steps", "few-steps-fresh", "few-steps-others")), sep="\n\n")


if __name__ == "__main__":
    main()
