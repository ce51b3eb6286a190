"""What the parts of a sampling step cost, each against a plain implementation with the same weights, in the same run.

    python benchmarks/sampling_step.py

The plain network is eager, in contiguous memory, with einsum attention, PyTorch's own normalization, activation and 1×1
convolutions, and embeddings computed at every step, as guided-diffusion runs. The plain classifier is in contiguous memory with
its BatchNorm left as it is. Outputs are compared before anything is timed, and the two sides take turns, so that a drift of the
machine's speed meets both.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from guidance_share import ADM64
from PIL import Image
from timing import Ratio, in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.backend import tuning
from calib_guidance.backend.compilation import Compiled
from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser, Denoiser, Prediction
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance import Guidance, Guided, Plan
from calib_guidance.networks import SmallResNet, UNet, adm
from calib_guidance.samplers import DDPM


def einsum_attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Attention by two einsums and a softmax, the plain way."""
    n, tokens, width = qkv.shape
    channels = width // (3 * heads)
    order = (n, tokens, 3, heads, channels) if new_order else (n, tokens, heads, 3, channels)
    q, k, v = qkv.view(order).unbind(2 if new_order else 3)
    weight = torch.einsum("nqhc,nkhc->nhqk", q * channels**-0.25, k * channels**-0.25).softmax(dim=-1)
    return torch.einsum("nhqk,nkhc->nqhc", weight, v).reshape(n, tokens, heads * channels)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Networks run without what makes them fast here."""
    with tuning.plain(), mock.patch.object(adm, "_attend", einsum_attention):
        yield


class PlainUNet(UNet):
    """A network of float32 in contiguous memory; of one that is copied, by its ``__class__``."""

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        states, h = [], x
        for block in self.input_blocks:
            h = block(h, emb)
            states.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, states.pop()], dim=1), emb)
        return self.out(h)


class Table:
    """Prints a line for each part, and keeps the ratios."""

    def __init__(self) -> None:
        self.ratios: dict[str, Ratio] = {}

    def add(
        self,
        name: str,
        plain: Callable[[], object],
        here: Callable[[], object],
        rounds: int,
        error: float,
        against: str = "plain / here",
    ) -> float:
        """Time both, in turns; returns the median seconds of ``here``."""
        times = in_turns({"plain": plain, "here": here}, rounds)
        found = self.ratios[f"{name}: {against}"] = ratio(times["plain"], times["here"])
        medians = " | ".join(f"{1e3 * statistics.median(seconds):.1f}" for seconds in times.values())
        print(f"| {name} | {medians} | {found} | {error:.1e} |")
        return statistics.median(times["here"])


def network(table: Table, name: str, unet: UNet, batch: int, rounds: int, compiled: bool) -> float:
    """Forward pass of the diffusion network; returns its median time in seconds, not compiled."""
    unet = unet.eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    plain = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
    plain.__class__ = PlainUNet
    x = torch.randn(batch, unet.in_channels, unet.image_size, unet.image_size)
    t, y = torch.full((batch,), 500), torch.arange(batch) % unet.num_classes
    emb = (unet.embed_time(t) + unet.embed_labels(y)).contiguous()

    def run_plain() -> Tensor:
        return plain.decode(x, plain.embed_time(t) + plain.embed_labels(y))

    def run_tuned() -> Tensor:
        return unet.decode(x, emb)

    with torch.no_grad():
        with plainly():
            expected = run_plain()
        difference = float((run_tuned() - expected).abs().max())

        def timed_plain() -> None:
            with plainly():
                run_plain()

        seconds = table.add(f"{name}, network", timed_plain, run_tuned, rounds, difference)
        if compiled:
            fast = Compiled(unet.decode)
            difference = float((fast(x, emb) - expected).abs().max())
            table.add(
                f"{name}, network compiled", run_tuned, lambda: fast(x, emb), rounds, difference, "eager / compiled"
            )
        return seconds


def classifier_gradient(
    table: Table, name: str, classifier: OffTheShelfClassifier, shape: tuple[int, ...], rounds: int, compiled: bool
) -> float:
    """Gradient of a logit with respect to the image; returns its median time in seconds, not compiled."""
    plain, fast = (copy.deepcopy(classifier).eval().requires_grad_(False) for _ in range(2))
    tuned = classifier.freeze()
    x = torch.randn(shape)

    def gradient(model: OffTheShelfClassifier) -> Tensor:
        source = x.clone().requires_grad_()
        return torch.autograd.grad(model(source)[:, 0].sum(), source)[0]

    difference = float((gradient(plain) - gradient(tuned)).abs().max())
    name = f"{name}, classifier gradient"
    seconds = table.add(name, lambda: gradient(plain), lambda: gradient(tuned), rounds, difference)
    if compiled:
        fast.is_compiled = True
        fast.freeze()
        difference = float((gradient(plain) - gradient(fast)).abs().max())
        eager, name = (lambda: gradient(tuned)), f"{name} compiled"
        table.add(name, eager, lambda: gradient(fast), rounds, difference, "eager / compiled")
    return seconds


class Nothing(Denoiser):
    """A denoiser that costs nothing: what remains is the sampler's arithmetic and the noise."""

    def __init__(self, like: Denoiser):
        super().__init__()
        self.schedule, self.image_shape, self.num_classes = like.schedule, like.image_shape, None
        self.has_learned_variance = True

    def prepare(self, levels: object, y: object) -> Callable[[Tensor, int], Prediction]:
        return lambda x_t, i: Prediction(x_t, x_t)


class Constant(Guidance):
    """Guidance whose gradient costs nothing: what remains is what the sampler does with it."""

    def prepare(self, levels: object, y: object, decode: object) -> Callable[..., Guided]:
        def guide(predict: Callable[..., Prediction], x_t: Tensor, i: int) -> Guided:
            prediction = predict(x_t, i)
            return Guided(prediction, prediction.x0)

        return guide

    def plan(self, levels: NoiseLevels) -> Plan:
        ones = np.ones(len(levels.times))
        return Plan(ones > 0, ones, ones / 2, ones > 0)

    def parts(self) -> tuple[Guidance]:
        return (self,)


def write(images: Tensor) -> None:
    """PNG of each image, as they are kept."""
    for image in to_uint8(images, "truncate").numpy():
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(io.BytesIO(), format="PNG")


def overhead(name: str, denoiser: Denoiser, batch: int, step: float) -> tuple[str, Ratio]:
    """What sampler, noise and, spread over 250 steps, writing take of a step of ``step`` seconds; how often they go into it."""
    sampler, y = DDPM("25"), torch.zeros(batch, dtype=torch.long)
    parts: list[tuple[float, float, float]] = []
    for _ in range(6):
        noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape)
        started = time.perf_counter()
        for _ in range(25):
            noise()
        drawn = time.perf_counter()
        x = sampler(Nothing(denoiser), SampleStreams([0] * batch, range(batch), denoiser.image_shape), y, Constant())
        made = time.perf_counter()
        write(x)
        done = time.perf_counter()
        random = (drawn - started) / 25
        parts.append(((made - drawn) / 25 - random, random, (done - made) / 250))
    columns = [statistics.median(column) for column in zip(*parts[1:], strict=True)]
    fractions = [f"{1e3 * seconds:.3f} ms ({100 * seconds / step:.2f} %)" for seconds in (*columns, sum(columns))]
    print(f"| {name} | {1e3 * step:.0f} ms | {' | '.join(fractions)} |")
    return f"{name}: step / sampler, noise and writing", Ratio.of([step / sum(part) for part in parts[1:]])


def main() -> None:
    """Print the tables."""
    arguments = parser(__doc__, rounds=9)
    help = "also the compiled network and classifier, against those that are not (5 to 10 minutes of compiling)"
    arguments.add_argument("--compile", action="store_true", help=help)
    options = arguments.parse_args()
    torch.manual_seed(0)
    digits = {"model_channels": 32, "out_channels": 2, "num_res_blocks": 1, "attention_resolutions": (2,)}
    digits |= {"channel_mult": (1, 2), "num_classes": 10, "num_head_channels": 32}
    digits |= {"use_scale_shift_norm": True, "resblock_updown": True}
    table, steps = Table(), []
    print(f"{machine()}, {options.rounds} rounds; milliseconds are medians")
    print("| what | plain, ms | here, ms | plain / here (min … max) | largest difference |\n|---|---:|---:|---:|---:|")
    systems = {
        "digits, batch 100": (UNet(8, 1, **digits), 100, OffTheShelfClassifier(SmallResNet(), 10, softplus_beta=3.0)),
        "ADM-64 at 64 channels, batch 2": (UNet(64, 3, **ADM64), 2, OffTheShelfClassifier("torchvision/resnet50")),
    }
    for name, (unet, batch, guide) in systems.items():
        step = network(table, name, unet, batch, options.rounds, options.compile)
        denoiser = ADMDenoiser(unet)
        shape = (batch, *denoiser.image_shape)
        step += classifier_gradient(table, name, guide, shape, options.rounds, options.compile)
        steps.append((name, denoiser, batch, step))
    larger = OffTheShelfClassifier("torchvision/resnet50")
    classifier_gradient(table, "ResNet-50 at 64 pixels, batch 8", larger, (8, 3, 64, 64), options.rounds, False)
    print(
        "\n| of a guided step | step | sampler | noise | writing, of 250 steps | together |\n|---|---:|---:|---:|---:|---:|"
    )
    table.ratios |= dict(overhead(*step) for step in steps)
    keep(options.json, "sampling_step", table.ratios)


if __name__ == "__main__":
    main()
