"""The cost model against measurement: time of a sampling step on this CPU, in float32, and what is expected of named GPUs.

    python benchmarks/cost_model.py

The operators of a step are counted on the meta device, without weights. Their speeds are those of a short microbenchmark,
which knows none of these networks. Steps are then measured in turns; with one thread (``OMP_NUM_THREADS=1``) by CPU time, which
other programs lengthen less. The expectation for GPUs is of the same operators in 16 bits, from public peak rates; it is not
measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import Ratio, in_turns, keep, machine, parser
from torch import Tensor, nn

from calib_guidance.backend.cost import GPUS, Work, WorkCounter
from calib_guidance.backend.speeds import clock, this_cpu
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser, Denoiser, DiTDenoiser, EDM2Denoiser, EDMDenoiser, FlowDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, Guidance
from calib_guidance.networks import DiT, EDM2UNet, UNet
from calib_guidance.samplers import DDPM, FlowODE, Heun, Sampler, StepRecord
from calib_guidance.scores import DivergenceRegularized

UNET = {"model_channels": 64, "num_res_blocks": 2, "num_classes": 1000, "num_head_channels": 64}
UNET |= {
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "attention_resolutions": (2, 4),
    "channel_mult": (1, 2, 3),
}
SMALL = {"sample_size": 16, "hidden_size": 384, "depth": 12, "num_heads": 6}
STEPS = 3


class System(NamedTuple):
    """A denoiser that is made with random weights, its sampler, and images at a time."""

    denoiser: Callable[[], Denoiser]
    sampler: Sampler
    batch: int
    guided: bool = False


def classifier() -> OffTheShelfClassifier:
    return OffTheShelfClassifier("torchvision/resnet50")


SYSTEMS = {
    "ADM, 32 pixels": System(lambda: ADMDenoiser(UNet(32, 3, out_channels=6, **UNET)), DDPM(STEPS), 4),
    "ADM, 32 pixels, ResNet-50": System(lambda: ADMDenoiser(UNet(32, 3, out_channels=6, **UNET)), DDPM(STEPS), 4, True),
    "EDM, 32 pixels": System(lambda: EDMDenoiser(UNet(32, 3, out_channels=3, **UNET)), Heun(STEPS), 4),
    "EDM2, 32 pixels": System(
        lambda: EDM2Denoiser(EDM2UNet(32, 3, 1000, model_channels=64, channel_mult=(1, 2, 3), num_blocks=2)),
        Heun(STEPS),
        4,
    ),
    "DiT, 64 tokens": System(lambda: DiTDenoiser(DiT(**SMALL), vae=nn.Identity()), DDPM(STEPS), 4),
    "SiT, 64 tokens": System(lambda: FlowDenoiser(DiT(**SMALL), vae=nn.Identity()), FlowODE(STEPS), 4),
}


def trajectory(system: System, device: str) -> Callable[..., Tensor]:
    """Samples one batch, with observers as they are given."""
    with torch.device(device):
        denoiser = system.denoiser().to(device).eval().requires_grad_(False)
        guidance: Guidance | None = None
        if system.guided:
            guidance = ClassifierGuidance(classifier(), DivergenceRegularized("js", alpha=0.1, tau2=0.5)).to(device)

    def run(*observers: Callable[[StepRecord], None]) -> Tensor:
        noise = SampleStreams([0] * system.batch, range(system.batch), denoiser.image_shape, device, ahead=False)
        y = torch.arange(system.batch, device=device)
        return system.sampler(denoiser, noise, y, guidance, observers)

    return run


def works_of_a_step(system: System) -> list[Work]:
    """Its operators at the second step."""
    steps: list[list[Work]] = []
    with WorkCounter() as counter:
        trajectory(system, "meta")(lambda record: steps.append(counter.take()))
    return steps[1]


class Stopwatch:
    """Seconds of each step but the first."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._last: float | None = None

    def __call__(self, record: StepRecord) -> None:
        now = clock()
        if self._last is not None:
            self.laps.append(now - self._last)
        self._last = now


def main() -> None:
    """Print the tables."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--system", choices=SYSTEMS, nargs="+", default=list(SYSTEMS), help="(all)")
    options = arguments.parse_args()
    torch.manual_seed(0)
    started = clock()
    cpu = this_cpu()
    kind = "CPU" if torch.get_num_threads() == 1 else "wall"
    print(f"{machine()}, {options.rounds} rounds; speeds measured in {clock() - started:.1f} s of {kind} time\n")
    works = {name: works_of_a_step(SYSTEMS[name]) for name in options.system}
    runs, watches = {}, {name: [] for name in works}
    for name in works:
        run = trajectory(SYSTEMS[name], "cpu")

        def watched(run: Callable[..., Tensor] = run, name: str = name) -> None:
            watch = Stopwatch()
            run(watch)
            watches[name].append(min(watch.laps[:-1] or watch.laps))

        runs[name] = watched
    in_turns(runs, options.rounds)
    print("| a step of | operators | GFLOP | predicted, ms | measured, ms (min … max) | predicted / measured |")
    print("|---|---:|---:|---:|---:|---:|")
    ratios = {}
    for name, each in works.items():
        seconds = watches[name][1:]
        predicted, flops = cpu.seconds(each), sum(work.flops for work in each) / 1e9
        found = ratios[f"{name}: predicted / measured"] = Ratio.of([predicted / s for s in seconds])
        times = f"{1e3 * statistics.median(seconds):.0f} ({1e3 * min(seconds):.0f} … {1e3 * max(seconds):.0f})"
        print(f"| {name} | {len(each)} | {flops:.1f} | {1e3 * predicted:.0f} | {times} | {found} |")
    worst = max(abs(found.median - 1) for found in ratios.values())
    print(f"\nLargest error: {100 * worst:.0f} %")
    print(f"\n| expected of | {' | '.join(f'{name}, ms' for name in GPUS)} |\n|---|{'---:|' * len(GPUS)}")
    for name, each in works.items():
        halves = [work._replace(half=True, bytes=work.bytes / 2) for work in each]
        print(f"| {name} in 16 bits | {' | '.join(f'{1e3 * gpu.seconds(halves):.2f}' for gpu in GPUS.values())} |")
    keep(options.json, "cost_model", ratios)


if __name__ == "__main__":
    main()
