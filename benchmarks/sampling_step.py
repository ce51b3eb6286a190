"""What the parts of a sampling step cost, each against a plain implementation with the same weights, in the same run.

    python benchmarks/sampling_step.py

The plain network is eager, in contiguous memory, with einsum attention, PyTorch's own normalisation, activation and 1×1
convolutions, and embeddings computed at every step, as guided-diffusion runs. The plain classifier is in contiguous memory with
its BatchNorm left as it is. Outputs are compared before anything is timed, and the two sides take turns, so that a drift of the
machine's speed meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.compilation import Compiled
from calib_guidance.denoisers import ADMDenoiser, Denoiser, Prediction
from calib_guidance.images import to_uint8
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


def plain_pointwise(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution of pixels ``(…, C)`` as a convolution."""
    if isinstance(conv, nn.Conv1d):
        return F.conv1d(x.transpose(1, 2), conv.weight, conv.bias).transpose(1, 2)
    return F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias).permute(0, 2, 3, 1)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Networks run without what makes them fast here."""
    with (
        mock.patch.object(adm, "_attend", einsum_attention),
        mock.patch.object(adm, "pointwise", plain_pointwise),
        mock.patch.object(adm.GroupNorm, "_is_slow", return_value=False),
        mock.patch.object(adm.SiLU, "forward", lambda _, x: F.silu(x)),
    ):
        yield


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
    decode = Compiled(unet.decode) if compiled else unet.decode

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
        with plainly():
            expected = run_plain()
        difference = float((run_tuned() - expected).abs().max())

        def timed_plain() -> None:
            with plainly():
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
    report(f"{name}, classifier gradient{', compiled' if classifier.is_compiled else ''}", *times, difference)
    return statistics.median(times[1])


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations, a multiplication and an addition each one."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def guidance_share(
    name: str, unet: UNet, classifier: OffTheShelfClassifier, batch: int, times: tuple[float, float]
) -> None:
    """What guidance takes of a step, against its share of the operations."""
    x = torch.randn(batch, unet.in_channels, unet.image_size, unet.image_size)
    emb = torch.zeros(batch, unet.emb_channels)
    with torch.no_grad():
        diffusion = operations(lambda: unet.decode(x, emb))
    source = 1 * x.requires_grad_()  # the counter takes no leaf of the graph
    guiding = operations(lambda: torch.autograd.grad(classifier(source)[:, 0].sum(), source))
    counted, measured = guiding / (guiding + diffusion), times[1] / sum(times)
    print(
        f"{name}: guidance takes {100 * measured:.1f} % of a step, {100 * counted:.1f} % of its operations: "
        f"{measured / counted:.2f} times its share"
    )


class Nothing(Denoiser):
    """A denoiser that costs nothing: what remains is the sampler's arithmetic and the noise."""

    def __init__(self, like: Denoiser):
        super().__init__()
        self.schedule, self.image_shape, self.num_classes = like.schedule, like.image_shape, None
        self.has_learned_variance = True

    def trajectory(self, levels: object, y: object) -> Callable[[Tensor, int], Prediction]:
        return lambda x_t, i: Prediction(x_t, x_t)


def write(images: Tensor) -> None:
    """PNG of each image, as they are kept."""
    for image in to_uint8(images, "truncate").numpy():
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(io.BytesIO(), format="PNG")


def overhead(name: str, denoiser: Denoiser, batch: int, step: float) -> None:
    """Sampler arithmetic, noise and, spread over 250 steps, writing, as a share of a step that takes ``step`` seconds."""
    sampler, y = DDPM("25"), torch.zeros(batch, dtype=torch.long)
    found = []
    for _ in range(6):
        noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape)
        started = time.perf_counter()
        x = sampler(Nothing(denoiser), noise, y)
        made = time.perf_counter()
        write(x)
        found.append((made - started) / 25 + (time.perf_counter() - made) / 250)
    cost = statistics.median(found[1:])
    print(
        f"{name}: sampler arithmetic, noise and writing {1e3 * cost:.2f} ms a step of {1e3 * step:.0f} ms, "
        f"{100 * cost / step:.2f} %"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed repetitions of each side (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also the compiled network and classifier")
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
    overheads, shares = [], []
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
        shape = (batch, *denoiser.image_shape)
        if options.compile:
            compiled = copy.deepcopy(guide)
            compiled.is_compiled = True
            classifier_gradient(name, compiled, shape, options.rounds)
        guiding = classifier_gradient(name, guide, shape, options.rounds)
        overheads.append((name, denoiser, batch, step + guiding))
        shares.append((name, unet, guide, batch, (step, guiding)))
    print()
    for arguments in shares:
        guidance_share(*arguments)
    for arguments in overheads:
        overhead(*arguments)


if __name__ == "__main__":
    main()
