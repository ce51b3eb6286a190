"""What the forms of Smooth ECE add to a training step of a classifier: ResNet-50, 64×64, batch 32, cross-entropy, AdamW.

    python benchmarks/calibration_loss.py

The steps take turns on one network, to expose all of them to the same drift of the machine. Differences of complete steps carry
the noise of the step, which on a busy machine is above what a loss costs; the last column is free of it: the loss alone,
forward and backward to the logits, as a fraction of the fastest plain step, which makes the most of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from calib_guidance.training import binned_smooth_ece, smooth_ece

Loss = Callable[[Tensor, Tensor], Tensor]
FORMS: dict[str, Loss] = {"per sample": smooth_ece, "binned": binned_smooth_ece}


def seconds(function: Callable[[], object]) -> float:
    """What one call takes, to its end on the device."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torchvision.models.resnet50().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters())
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    y = torch.randint(1000, (options.batch,), device=device)

    def step(form: Loss | None) -> None:
        optimizer.zero_grad()
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        if form is not None:
            loss = loss + 0.5 * form(logits, y)
        loss.backward()
        optimizer.step()

    logits = network(x).detach().requires_grad_()
    losses: dict[str, Callable[[], object]] = {
        name: lambda form=form: torch.autograd.grad(form(logits, y), logits) for name, form in FORMS.items()
    }
    steps = {name: lambda form=form: step(form) for name, form in {"none": None, **FORMS}.items()}
    total: dict[str, list[float]] = {name: [] for name in steps}
    alone: dict[str, list[float]] = {name: [] for name in losses}
    for round_ in range(options.rounds + 1):
        for functions, times in ((steps, total), (losses, alone)):
            for name, function in functions.items():
                taken = seconds(function)
                if round_:  # the first is a warm-up
                    times[name].append(taken)

    fastest = min(total["none"])
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{where}, {options.rounds} rounds, batch {options.batch} of {options.size}×{options.size}; medians (min … max)"
    )
    print(
        "| loss | step, ms | step / plain step | loss alone, ms | alone, % of fastest plain step |\n|---|---:|---:|---:|---:|"
    )
    for name, times in total.items():
        ratios = [a / b for a, b in zip(times, total["none"], strict=True)]
        cells = [name, with_range(times, 1e3, 1), with_range(ratios, 1, 3)]
        cells += (
            [with_range(alone[name], 1e3, 3), with_range(alone[name], 100 / fastest, 3)]
            if name in alone
            else ["–", "–"]
        )
        print(f"| {' | '.join(cells)} |")


def with_range(values: list[float], unit: float, digits: int) -> str:
    """Median (min … max)."""
    median, low, high = (f"{unit * v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} … {high})"


if __name__ == "__main__":
    main()
