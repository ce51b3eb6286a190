"""Peak memory of guided sampling by batch size, each in a process of its own.

    python benchmarks/memory.py

On a GPU the most bytes that PyTorch had allocated, else the most resident memory of the process, less what was taken before the
first step (interpreter, libraries, weights).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from guidance_share import ADM64

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDPM


def begin() -> float:
    """MiB taken now, from where the peak is looked for."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept would be reused without raising the peak
    Path("/proc/self/clear_refs").write_text("5")  # else the peak would be that of drawing random weights
    return _resident("VmRSS")


def peak() -> float:
    """MiB at the peak since :func:`begin`."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def measure(batch: int, options: dict[str, object] | None, answer: Connection) -> None:
    """Send the MiB that three steps take at their peak, of ADM-64 at 64 channels under ResNet-50."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = ADMDenoiser(UNet(64, 3, **ADM64)).to(device)
    guidance = (
        None
        if options is None
        else ClassifierGuidance(OffTheShelfClassifier("torchvision/resnet50"), **options).to(device)
    )
    before = begin()
    noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape, device)
    DDPM("3")(denoiser, noise, torch.zeros(batch, dtype=torch.long, device=device), guidance)
    answer.send(peak() - before)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="images (1 4 16)")
    sizes = options.parse_args().batch
    kinds = {"unguided": None, "x̂0": {}, "x̂0, through the denoiser": {"backprop_through_denoiser": True}}
    print(f"| guided on | {' | '.join(f'batch {size}, MiB' for size in sizes)} | MiB an image more |")
    print(f"|---|{'---:|' * (len(sizes) + 1)}")
    context = multiprocessing.get_context("spawn")
    for name, at in kinds.items():
        found = []
        for size in sizes:
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(size, at, there))
            process.start()
            there.close()
            found.append(here.recv())
            process.join()
        slope = (found[-1] - found[0]) / max(sizes[-1] - sizes[0], 1)
        print(f"| {name} | {' | '.join(f'{mib:.0f}' for mib in found)} | {slope:.1f} |")


if __name__ == "__main__":
    main()
