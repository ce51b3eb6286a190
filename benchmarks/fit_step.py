"""What the options of ``fit`` buy in a training step, each against the plain step with the same weights, noise and images.

    python benchmarks/fit_step.py

A step is that of the shipped modules with its backward pass and that of the optimizer. The losses of the first step are compared
before anything is timed; later ones differ by what an untrained ResNet-50 on few images makes of rounding. The two sides take
turns, so that a drift of the machine's speed meets both. On a GPU the tuned sides of the classifier and of the diffusion model
also run in bf16. The last line reads JPEG files while a simulated device is busy: it leaves the CPU alone for so long per batch.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from timing import Ratio, in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.data import ImageData
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.networks import UNet
from calib_guidance.tasks import CalibrateClassifier, TrainDiffusion
from calib_guidance.training import DenoisedInput, NoisyInput

RATIOS: dict[str, Ratio] = {}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], Tensor]


def stepper(module: L.LightningModule, batch: dict[str, Tensor], half: bool = False) -> Step:
    """A function that makes one training step and gives its loss."""
    module = module.to(DEVICE).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    batch = {name: column.to(DEVICE) for name, column in batch.items()}

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def report(name: str, plain: list[float], tuned: list[float], difference: str) -> None:
    """One line of the table."""
    found = RATIOS[f"{name}: plain / tuned"] = ratio(plain, tuned)
    medians = " | ".join(f"{1e3 * statistics.median(seconds):.1f}" for seconds in (plain, tuned))
    print(f"| {name} | {medians} | {found} | {difference} |", flush=True)


def compare(name: str, plain: Step, tuned: Step, rounds: int) -> None:
    """The loss of each from the same seed, then turns."""
    losses = []
    for step in (plain, tuned):
        torch.manual_seed(0)
        losses.append(float(step()))
    difference = abs(losses[0] - losses[1])
    times = in_turns({"plain": plain, "tuned": tuned}, rounds)
    report(name, times["plain"], times["tuned"], f"{difference:.1e} of {losses[0]:.2f}")


def classifier(rounds: int, batch: int, size: int) -> None:
    """ResNet-50, channels-last, compiled, both."""
    torch.manual_seed(0)
    network = OffTheShelfClassifier("torchvision/resnet50")
    images = {"image": torch.rand(batch, 3, size, size) * 2 - 1, "label": torch.arange(batch)}

    def build(channels_last: bool, compile: bool) -> CalibrateClassifier:
        module = CalibrateClassifier(copy.deepcopy(network), NoisyInput(), channels_last=channels_last, compile=compile)
        if channels_last:  # which a trainer has it do before it fits
            module.classifier.to(memory_format=torch.channels_last)
        return module

    half = DEVICE.type == "cuda"
    for name, options in (("channels_last", (True, False)), ("compile", (False, True)), ("both", (True, True))):
        plain, tuned = stepper(build(False, False), images), stepper(build(*options), images, half)
        compare(f"ResNet-50, {size}×{size}, batch {batch}: {name}{', bf16' if half else ''}", plain, tuned, rounds)


def diffusion(rounds: int, batch: int, size: int, channels: int) -> None:
    """An ADM network, compiled."""
    torch.manual_seed(0)
    network = UNet(size, 3, channels, 6, 1, (4,), channel_mult=(1, 2, 2), num_classes=10, num_heads=4)
    images = {"image": torch.rand(batch, 3, size, size) * 2 - 1, "label": torch.arange(batch) % 10}
    plain, half = stepper(TrainDiffusion(copy.deepcopy(network)), images), DEVICE.type == "cuda"
    tuned = stepper(TrainDiffusion(network, compile=True), images, half)
    compare(f"ADM, {size}×{size}, {channels} channels, batch {batch}: compile", plain, tuned, rounds)


def denoised_online(rounds: int, batch: int, size: int, channels: int) -> None:
    """ResNet-50 on what a frozen ADM network makes of noisy images, the frozen network in bf16."""
    torch.manual_seed(0)
    unet = UNet(size, 3, channels, 6, 1, (4,), channel_mult=(1, 2, 2), num_classes=1000, num_heads=4)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    network = OffTheShelfClassifier("torchvision/resnet50")
    images = {"image": torch.rand(batch, 3, size, size) * 2 - 1, "label": torch.arange(batch)}

    def build(precision: str) -> Step:
        denoiser = ADMDenoiser(copy.deepcopy(unet), noise_schedule="cosine", prediction="v")
        input_transform = DenoisedInput(denoiser, "250", precision=precision)
        return stepper(CalibrateClassifier(copy.deepcopy(network), input_transform, channels_last=False), images)

    compare(f"denoised online, ADM {size}×{size}: precision bf16", build("fp32"), build("bf16"), rounds)


def loading(rounds: int, workers: int, pause: float, batches: int = 12, batch: int = 16) -> None:
    """Seconds per batch of JPEG files of 256×256, read by the process itself or by workers, beside a simulated device."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for n in range(batches * batch):
            noise = F.interpolate(torch.randn(1, 3, 32, 32, generator=generator), scale_factor=8, mode="bicubic")[0] / 3
            path = Path("images/train", str(n % 2), f"{n}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_uint8(noise).permute(1, 2, 0).numpy()).save(path, quality=90)

        def epoch(num_workers: int) -> tuple[float, Tensor]:
            """Seconds per batch after the first, which waits for the workers to start, and the batches."""
            data = ImageData(f"{folder}/images", 64, batch, num_workers, val_split="train", seed=0)
            data.setup("fit")
            seen = []
            for found in data.train_dataloader():
                if not seen:
                    started = time.perf_counter()
                time.sleep(pause)
                seen.append(found["image"])
            return (time.perf_counter() - started) / len(seen), torch.cat(seen)

        difference = float((epoch(0)[1] - epoch(workers)[1]).abs().max())
        times = [(epoch(0)[0], epoch(workers)[0]) for _ in range(rounds)]
    name = f"reading JPEGs beside a device that takes {1e3 * pause:.0f} ms: {workers} workers"
    report(name, *(list(column) for column in zip(*times, strict=True)), f"{difference:.1e}")


def main() -> None:
    """Print the tables."""
    parts = ("classifier", "diffusion", "denoised", "loading")
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--size", type=int, default=64, help="pixels a side")
    arguments.add_argument("--channels", type=int, default=64, help="of the ADM network")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument(
        "--pause", type=float, default=0.3, help="seconds that the simulated device takes for a batch"
    )
    arguments.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = arguments.parse_args()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    print(f"{machine()}, {options.rounds} rounds; ms per step, medians\n")
    print(
        "| option | plain | tuned | plain / tuned (min … max) | difference of the losses |\n|---|---:|---:|---:|---:|"
    )
    if "classifier" in options.parts:
        classifier(options.rounds, options.batch, options.size)
    if "diffusion" in options.parts:
        diffusion(options.rounds, options.batch, options.size, options.channels)
    if "denoised" in options.parts:
        denoised_online(options.rounds, options.batch, options.size, options.channels)
    if "loading" in options.parts:
        loading(options.rounds, options.workers, options.pause)
    keep(options.json, "fit_step", RATIOS)


if __name__ == "__main__":
    main()
