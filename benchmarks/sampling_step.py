"""What the parts of a sampling step cost, each against a plain implementation with the same weights, in the same run.

    python benchmarks/sampling_step.py

The plain network is eager, in contiguous memory, with einsum attention and embeddings computed at every step, as
guided-diffusion runs. The plain classifier is in contiguous memory with its BatchNorm left as it is. Outputs are compared
before anything is timed, and the two sides take turns, so that a drift of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser, Denoiser, Prediction
from calib_guidance.networks import SmallResNet, UNet, adm
from calib_guidance.rng import SampleStreams
from calib_guidance.samplers import DDPM


def einsum_attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Attention by two einsums and a softmax, the plain way."""
    n, tokens, width = qkv.shape
    channels = width // (3 * heads)
    order = (n, tokens, 3, heads, channels) if new_order else (n, tokens, heads, 3, channels)
    q, k, v = qkv.view(order).unbind(2 if new_order else 3)
    weight = torch.einsum("nqhc,nkhc->nhqk", q * channels**-0.25, k * channels**-0.25).softmax(dim=-1)
    return torch.einsum("nhqk,nkhc->nqhc", weight, v).reshape(n, tokens, heads * channels)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, taking turns, after one warm-up of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for function, found in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            if round_:
                found.append(time.perf_counter() - started)
    return times


def report(name: str, plain: list[float], tuned: list[float], difference: float) -> None:
    """One line of the table."""
    ratios = sorted(p / t for p, t in zip(plain, tuned, strict=True))
    print(
        f"| {name} | {1e3 * statistics.median(plain):.1f} | {1e3 * statistics.median(tuned):.1f} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f}) | {difference:.1e} |"
    )


def network(name: str, unet: UNet, batch: int, rounds: int, compiled: bool) -> float:
    """Forward pass of the diffusion network; returns its median time in seconds."""
    unet = unet.eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    plain = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
    x = torch.randn(batch, unet.in_channels, unet.image_size, unet.image_size)
    t, y = torch.full((batch,), 500), torch.arange(batch) % unet.num_classes
    emb = (unet.embed_time(t) + unet.embed_labels(y)).contiguous()
    decode = torch.compile(unet.decode, dynamic=False) if compiled else unet.decode

    def run_plain() -> Tensor:
        emb = plain.embed_time(t) + plain.embed_labels(y)
        states, h = [], x
        for block in plain.input_blocks:
            h = block(h, emb)
            states.append(h)
        h = plain.middle_block(h, emb)
        for block in plain.output_blocks:
            h = block(torch.cat([h, states.pop()], dim=1), emb)
        return plain.out(h)

    def run_tuned() -> Tensor:
        return decode(x, emb)

    with torch.no_grad():
        with mock.patch.object(adm, "_attend", einsum_attention):
            expected = run_plain()
        difference = float((run_tuned() - expected).abs().max())

        def timed_plain() -> None:
            with mock.patch.object(adm, "_attend", einsum_attention):
                run_plain()

        times = interleaved(timed_plain, run_tuned, rounds)
    report(f"{name}, network{', compiled' if compiled else ''}", *times, difference)
    return statistics.median(times[1])


def classifier_gradient(name: str, classifier: OffTheShelfClassifier, shape: tuple[int, ...], rounds: int) -> float:
    """Gradient of a logit with respect to the image; returns its median time in seconds."""
    plain = copy.deepcopy(classifier).eval().requires_grad_(False)
    tuned = classifier.freeze()
    x = torch.randn(shape)

    def gradient(model: OffTheShelfClassifier) -> Tensor:
        source = x.clone().requires_grad_()
        return torch.autograd.grad(model(source)[:, 0].sum(), source)[0]

    difference = float((gradient(plain) - gradient(tuned)).abs().max())
    times = interleaved(lambda: gradient(plain), lambda: gradient(tuned), rounds)
    report(f"{name}, classifier gradient", *times, difference)
    return statistics.median(times[1])


class Nothing(Denoiser):
    """A denoiser that costs nothing: what remains is the sampler's arithmetic and the noise."""

    def __init__(self, like: Denoiser):
        super().__init__()
        self.schedule, self.image_shape, self.num_classes = like.schedule, like.image_shape, None
        self.has_learned_variance = True

    def trajectory(self, levels: object, y: object) -> Callable[[Tensor, int], Prediction]:
        return lambda x_t, i: Prediction(x_t, x_t)


def overhead(name: str, denoiser: Denoiser, batch: int, step: float) -> None:
    """Sampler arithmetic and noise of one step, as a share of a step that takes ``step`` seconds."""
    sampler, y = DDPM("25"), torch.zeros(batch, dtype=torch.long)
    found = []
    for _ in range(6):
        noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape)
        started = time.perf_counter()
        sampler(Nothing(denoiser), noise, y)
        found.append((time.perf_counter() - started) / 25)
    cost = statistics.median(found[1:])
    print(
        f"{name}: sampler arithmetic and noise {1e3 * cost:.2f} ms a step of {1e3 * step:.0f} ms, {100 * cost / step:.2f} %"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed repetitions of each side (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also the compiled network")
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = {"model_channels": 32, "out_channels": 2, "num_res_blocks": 1, "attention_resolutions": (2,)}
    digits |= {"channel_mult": (1, 2), "num_classes": 10, "num_head_channels": 32}
    adm64 = {
        "model_channels": 64,
        "num_res_blocks": 2,
        "attention_resolutions": (2, 4, 8),
        "channel_mult": (1, 2, 3, 4),
    }
    adm64 |= {"num_classes": 1000, "num_head_channels": 64, "use_new_attention_order": True}
    common = {"use_scale_shift_norm": True, "resblock_updown": True}
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds; milliseconds are medians")
    print("| what | plain, ms | here, ms | plain / here (min … max) | largest difference |\n|---|---:|---:|---:|---:|")
    overheads = []
    for name, unet, batch, guide in (
        (
            "digits, batch 100",
            UNet(8, 1, **digits, **common),
            100,
            OffTheShelfClassifier(SmallResNet(), 10, softplus_beta=3.0),
        ),
        (
            "ADM-64 at 64 channels, batch 2",
            UNet(64, 3, **adm64, **common),
            2,
            OffTheShelfClassifier("torchvision/resnet50"),
        ),
    ):
        step = network(name, unet, batch, options.rounds, compiled=False)
        if options.compile:
            network(name, unet, batch, options.rounds, compiled=True)
        denoiser = ADMDenoiser(unet)
        guided = step + classifier_gradient(name, guide, (batch, *denoiser.image_shape), options.rounds)
        overheads.append((name, denoiser, batch, guided))
    print()
    for arguments in overheads:
        overhead(*arguments)


if __name__ == "__main__":
    main()
