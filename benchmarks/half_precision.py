"""A guided loop in bfloat16 against float32, and both against a plain implementation in float32, in the same run.

    python benchmarks/half_precision.py

An ADM-like network of 64 channels for 64×64 pixels, guided by ResNet-50 on x̂0 (js score), DDPM. The plain implementation
is that of ``sampling_step.py``. The forms take turns. Processors need instructions for bfloat16 (avx512_bf16, amx_bf16).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from guidance_share import ADM64
from sampling_step import PlainUNet, plainly
from timing import Ratio, in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDPM
from calib_guidance.scores import DivergenceRegularized


def network(dtype: str) -> UNet:
    """The same weights in every type, none of them zero."""
    torch.manual_seed(0)
    unet = UNet(64, 3, **ADM64)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    typed = UNet(64, 3, **ADM64, dtype=dtype)
    typed.load_state_dict(unet.state_dict())
    return typed.eval().requires_grad_(False)


def loop(unet: UNet, classifier: OffTheShelfClassifier, steps: int, batch: int) -> Callable[[], Tensor]:
    """Samples one batch of 64×64 pixels."""
    denoiser, guidance = (
        ADMDenoiser(unet),
        ClassifierGuidance(classifier, DivergenceRegularized("js", alpha=0.1, tau2=0.5)),
    )

    def run() -> Tensor:
        noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape)
        return DDPM(str(steps))(denoiser, noise, torch.arange(batch), guidance)

    return run


def plain(run: Callable[[], Tensor]) -> Callable[[], None]:
    """A form without what makes it fast here."""

    def timed() -> None:
        with plainly():
            run()

    return timed


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--steps", type=int, default=3, help="of a loop (%(default)s)")
    arguments.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="images (2 8)")
    options = arguments.parse_args()
    networks = {dtype: network(dtype) for dtype in ("float32", "bfloat16")}
    contiguous = copy.deepcopy(networks["float32"]).to(memory_format=torch.contiguous_format)
    contiguous.__class__ = PlainUNet
    torch.manual_seed(0)
    unfrozen = OffTheShelfClassifier("torchvision/resnet50").eval().requires_grad_(False)
    guides = {dtype: OffTheShelfClassifier("torchvision/resnet50", dtype=dtype) for dtype in networks}
    for guide in guides.values():
        guide.load_state_dict(unfrozen.state_dict())
    unfrozen._frozen = True  # as it is: BatchNorm not folded, weights contiguous
    print(f"{machine()}, {options.rounds} rounds of {options.steps} steps; milliseconds are medians of a step\n")
    print("| what | batch | float32, ms | bfloat16, ms | float32 / bfloat16 | bfloat16 / plain | float32 / plain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    ratios: dict[str, Ratio] = {}
    for batch in options.batch:
        x, labels = torch.randn(batch, 3, 64, 64), torch.arange(batch)
        emb = networks["float32"].embed_time(labels) + networks["float32"].embed_labels(labels)
        forwards = {name: partial(unet.decode, x, emb) for name, unet in networks.items()}
        loops = {name: loop(networks[name], guides[name], options.steps, batch) for name in networks}
        forwards["plain"] = plain(partial(contiguous.decode, x, emb))
        loops["plain"] = plain(loop(contiguous, unfrozen, options.steps, batch))
        for what, forms, each in (("network", forwards, 1), ("guided loop", loops, options.steps)):
            with torch.no_grad():
                times = in_turns(forms, options.rounds)
            milliseconds = [f"{1e3 * statistics.median(times[name]) / each:.0f}" for name in networks]
            found = {
                "float32 / bfloat16": ratio(times["float32"], times["bfloat16"]),
                "plain / bfloat16": ratio(times["plain"], times["bfloat16"]),
                "plain / float32": ratio(times["plain"], times["float32"]),
            }
            shares = [ratio(times[name], times["plain"]) for name in ("bfloat16", "float32")]
            print(
                "| "
                + " | ".join([what, str(batch), *milliseconds, str(found["float32 / bfloat16"]), *map(str, shares)])
                + " |"
            )
            ratios |= {f"{what}, batch {batch}: {name}": value for name, value in found.items()}
    keep(options.json, "half_precision", ratios)


if __name__ == "__main__":
    main()
