"""What guiding a latent model through a decoder costs per step, by the decoder and by how often it is used.

    python benchmarks/decoder_guidance.py

Floating-point operations, multiply and add each one, are counted at full width, on the meta device. Time is measured on this
CPU at a reduced width whose parts have about the same fractions of operations (printed), over complete
trajectories that take turns, so a drift of the machine's speed meets all of them. The unit is the step without
classifier guidance: NFE 2, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from calib_guidance.backend.counters import FlopCounter, PeakMemory
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import (
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    LinearDecoder,
    TinyDecoder,
    VAEDecoder,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
from calib_guidance.networks import DiT
from calib_guidance.samplers import DDPM

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
BLOCKS |= {"layers_per_block": 2, "latent_channels": 4}
EVERY, INTERVAL = 4, (200, 600)


class System(NamedTuple):
    """DiT, the decoders and the classifier, at one width."""

    network: DiT
    full: VAEDecoder
    tiny: TinyDecoder
    linear: LinearDecoder
    classifier: OffTheShelfClassifier


def full_width() -> System:
    """DiT-XL/2 at 256×256, Stable Diffusion's decoder, TAESD and ResNet-101."""
    vae = BLOCKS | {"block_out_channels": (128, 256, 512, 512)}
    classifier = OffTheShelfClassifier("torchvision/resnet101", softplus_beta=3.0)
    return System(DiT(), VAEDecoder(vae), TinyDecoder({}), LinearDecoder(), classifier)


def reduced_width() -> System:
    """The same at 128×128, narrow."""
    vae = BLOCKS | {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16}
    tiny = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    classifier = OffTheShelfClassifier(ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16), 1000, softplus_beta=3.0)
    return System(DiT(16, 2, 384, 16, 6), VAEDecoder(vae), TinyDecoder(tiny), LinearDecoder(), classifier)


def operations(function: Callable[[], object]) -> float:
    """Floating-point operations of a call, multiply and add each one, in units of 10⁹."""
    with FlopCounter() as flops:
        function()
    return flops.get_total_flops() / 1e9


def gradient_operations(module: nn.Module, x: Tensor) -> float:
    """Of the module and its gradient with respect to the input."""
    module = module.eval().requires_grad_(False)
    source = x.requires_grad_()
    return operations(lambda: torch.autograd.grad(module(source).sum(), source))


def count(system: System) -> dict[str, float]:
    """Operations per image of each part."""
    size = system.network.image_size
    latent, image = torch.zeros(1, 4, size, size), torch.zeros(1, 3, 8 * size, 8 * size)
    with torch.no_grad():
        step = 2 * operations(lambda: system.network(latent, torch.zeros(1)))
    parts = {"step": step, "classifier": gradient_operations(system.classifier, image)}
    return parts | {name: gradient_operations(getattr(system, name), latent) for name in ("full", "tiny", "linear")}


def decoding(system: System, batch: int, decode_batch: int | None) -> tuple[float, float]:
    """Gigabytes alive at most, and 10⁹ operations per image, of a gradient through the full decoder."""
    denoiser = DiTDenoiser(system.network, vae=system.full, decode_batch=decode_batch)
    latents = torch.zeros(batch, *denoiser.image_shape, requires_grad=True)
    with FlopCounter() as flops, PeakMemory() as memory:
        torch.autograd.grad(denoiser.decode(latents).sum(), latents)
    return memory.peak / 1e9, flops.get_total_flops() / 1e9 / batch


def trajectories(system: System, steps: int, batch: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """Sampling with each kind of guidance, and the fraction of the steps that it guides."""
    denoiser = DiTDenoiser(system.network, vae=system.full, decode_batch=None)
    free = Combination(denoiser, ClassifierFreeGuidance(1.5), channels=3)
    sampler, y = DDPM(str(steps)), torch.arange(batch)
    kinds = {
        "none": {"scale": 0.0},
        "full decoder": {},
        f"full decoder, every {EVERY}th step": {"schedule": GuidanceSchedule(every=EVERY)},
        f"full decoder, t in {INTERVAL[0]} … {INTERVAL[1]}": {"schedule": GuidanceSchedule(interval=INTERVAL)},
        "tiny autoencoder": {"decoder": system.tiny},
        "linear decoder": {"decoder": system.linear},
    }
    runs, fractions = {}, {}
    for name, options in kinds.items():
        guidance = ClassifierGuidance(system.classifier, **{"scale": 0.5, "apply_to": "cfg_residual"} | options)
        active = guidance.schedule.active(sampler.levels(free))
        fractions[name] = sum(active) / len(active) if guidance.scale else 0.0

        def run(guidance: ClassifierGuidance = guidance) -> Tensor:
            noise = SampleStreams([0] * batch, range(batch), free.image_shape)
            return sampler(free, noise, y, guidance)

        runs[name] = run
    return runs, fractions


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed trajectories of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a trajectory (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device("meta"):
        system = full_width()
        full, reduced = count(system), count(reduced_width())
        memory = {part: decoding(system, 8, part) for part in (None, 4, 2, 1)}
    print(
        "| operations per image, 10⁹ | DiT-XL/2 | fraction of a step | reduced | fraction of a step |\n|---|---:|---:|---:|---:|"
    )
    names = {"step": "a step: two evaluations", "full": "full decoder", "tiny": "tiny autoencoder"}
    names |= {"linear": "linear decoder", "classifier": "classifier"}
    for part, name in names.items():
        counts = (
            f"{c[part]:{',.1f' if c[part] > 0.1 else '.0e'}} | {c[part] / c['step']:.2f}" for c in (full, reduced)
        )
        print(f"| {name}{'' if part == 'step' else ', there and back'} | {' | '.join(counts)} |")
    print("\n| decode_batch, of 8 images | memory, GB | operations per image, 10⁹ |\n|---|---:|---:|")
    for part, (gigabytes, each) in memory.items():
        print(f"| {part or 'all'} | {gigabytes:.1f} | {each:,.0f} |")

    runs, fractions = trajectories(reduced_width(), options.steps, options.batch)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            # The processor's time, which on one thread is the clock's, less what other programs take.
            started = time.process_time()
            run()
            if round_:  # the first one warms up
                times[name].append((time.process_time() - started) / options.steps)
    print(f"\n1 thread, {options.rounds} rounds, {options.steps} steps, batch {options.batch}")
    print(
        "| guidance | steps guided | DiT-XL/2, operations | reduced, operations | reduced, time (min … max) | ms a step |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    decoders = {"full decoder": "full", "tiny autoencoder": "tiny", "linear decoder": "linear"}
    for name, found in times.items():
        ratios = sorted(t / unguided for t, unguided in zip(found, times["none"], strict=True))
        counts = []
        for c in (full, reduced):
            part = decoders.get(name.split(",")[0])
            extra = fractions[name] * (c[part] + c["classifier"]) if part else 0.0
            counts.append(f"{1 + extra / c['step']:.2f}")
        print(
            f"| {name} | {100 * fractions[name]:.0f} % | {' | '.join(counts)} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} … {ratios[-1]:.2f}) | {1e3 * statistics.median(found):.0f} |"
        )


if __name__ == "__main__":
    main()
