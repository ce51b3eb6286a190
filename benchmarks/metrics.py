"""What metrics of samples cost: Fréchet distance against scipy.linalg.sqrtm, then time and peak memory of each metric at scale.

    python benchmarks/metrics.py                                 # 10,000 × 2048
    python benchmarks/metrics.py --samples 50000 --only-scale --processes 2

The Fréchet distances take turns with that by scipy.linalg.sqrtm, on features that are correlated and not negative, as Inception's
are. A drift of the machine's speed then affects all of them. At scale each metric runs in its own process. Its peak is what the
operating system counts beyond the features. ``--processes`` share precision and recall, and each has the features.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from timing import Ratio, in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.metrics import (
    bootstrap_sums,
    covariance_root,
    density_coverage,
    frechet_distance,
    frechet_distance_std,
    in_balls,
    kernel_distance_subsets,
    mean_and_covariance,
)
from calib_guidance.metrics.moments import Moments


def features(samples: int, width: int, seed: int) -> Tensor:
    """``(samples, width)`` float32, rectified and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    mixing *= torch.linspace(1, 0.05, width)[:, None]
    return (torch.randn(samples, width, generator=generator) @ mixing + 0.01 * seed).relu()


def by_sqrtm(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """The same distance through the square root of a matrix."""
    root = scipy.linalg.sqrtm(covariance1.numpy() @ covariance2.numpy())
    difference = (mean1 - mean2).numpy()
    return float(difference @ difference + np.trace(covariance1.numpy() + covariance2.numpy() - 2 * root.real))


def frechet(samples: int, width: int, rounds: int) -> dict[str, Ratio]:
    """Print the table of times; returns the ratios."""
    moments = [*mean_and_covariance(features(samples, width, 1)), *mean_and_covariance(features(samples, width, 2))]
    root = covariance_root(moments[1])
    forms: dict[str, Callable[[], float]] = {
        "scipy.linalg.sqrtm": lambda: by_sqrtm(*moments),
        "eigenvalues": lambda: float(frechet_distance(*moments)),
        "eigenvalues, reference's root kept": lambda: float(frechet_distance(*moments, root1=root)),
    }
    values = {name: form() for name, form in forms.items()}
    times = in_turns(forms, rounds)
    theirs = next(iter(forms))
    print(f"Fréchet distance, {width} dimensions, {samples} samples, {rounds} rounds; medians (min … max)")
    print("| form | seconds | sqrtm / this | relative difference |\n|---|---:|---:|---:|")
    ratios = {}
    for name, seconds in times.items():
        ratios[f"sqrtm / {name}"] = found = ratio(times[theirs], seconds)
        difference = abs(values[name] / values[theirs] - 1)
        print(f"| {name} | {Ratio.of(seconds)} | {found} | {difference:.1e} |")
    del ratios[f"sqrtm / {theirs}"]
    return ratios


def stream(reference: Tensor, generated: Tensor) -> str:
    """Mean and covariance of batches of 64, as features are extracted."""
    moments = Moments(generated.shape[1], generated.device)
    for rows in generated.split(64):
        moments.update(rows)
    return f"{float(moments.gather(DistributedContext())[1].trace()):.4g}"


def distance(reference: Tensor, generated: Tensor) -> str:
    """Fréchet distance with its standard deviation, of a reference whose moments are known from a tenth of it."""
    known = mean_and_covariance(reference[: len(reference) // 10])
    moments = mean_and_covariance(generated)
    std = frechet_distance_std(known, generated, moments=moments)
    return f"{float(frechet_distance(*known, *moments)):.4f} ± {float(std):.4f}"


def neighbors(reference: Tensor, generated: Tensor) -> str:
    precise, recalled = in_balls(reference, generated, processes=DistributedContext(*RANK))
    return f"{float(precise.double().mean()):.4f}, {float(recalled.double().mean()):.4f}"


def coverage(reference: Tensor, generated: Tensor) -> str:
    return ", ".join(f"{float(value):.4f}" for value in density_coverage(reference, generated))


def subsets(reference: Tensor, generated: Tensor) -> str:
    values = kernel_distance_subsets(reference, generated)
    return f"{float(values.mean()):.5f} ± {float(values.std()):.5f}"


def bootstrap(reference: Tensor, generated: Tensor) -> str:
    """Of 45 sums, those of a binned calibration error."""
    return f"{float(bootstrap_sums(generated[:, :45]).std(0).mean()):.4g}"


RANK = [0, 1]  # of this process
FORMS = {
    "mean and covariance of batches": stream,
    "Fréchet distance ± std": distance,
    "precision, recall": neighbors,
    "density, coverage": coverage,
    "kernel distance, 100 subsets": subsets,
    "bootstrap, 200 draws": bootstrap,
}


def resident(name: str) -> float:
    """Memory of this process now (``VmRSS``), or the most since :func:`forget` (``VmHWM``), GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def forget() -> None:
    """Look for the peak from here on; freed memory is returned to the system, or it would be reused without raising the peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(name: str, samples: int, width: int, rank: int, world: int, answer: Connection | None, port: int) -> None:
    """Measure one metric, in a process of its own."""
    reference, generated = features(samples, width, 1), features(samples, width, 2)
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        RANK[:] = rank, world
    forget()
    before, started = resident("VmRSS"), time.perf_counter()
    value = FORMS[name](reference, generated)
    if answer is not None:
        answer.send((value, time.perf_counter() - started, resident("VmHWM") - before))


def at_scale(name: str, samples: int, width: int, processes: int = 1) -> str:
    """A line of the table."""
    context, (here, there) = multiprocessing.get_context("spawn"), multiprocessing.Pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [there] + [None] * (processes - 1)
    started = [
        context.Process(target=work, args=(name, samples, width, rank, processes, answer, port))
        for rank, answer in enumerate(answers)
    ]
    for process in started:
        process.start()
    there.close()
    value, seconds, memory = here.recv()
    for process in started:
        process.join()
    return f"| {name}, {processes} process{'es' * (processes > 1)} | {seconds:.1f} | {memory:.2f} | {value} |"


def main() -> None:
    """Print the ratios."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--samples", type=int, default=10_000)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--metric", choices=FORMS, nargs="+", default=list(FORMS), help="at scale (all)")
    arguments.add_argument("--only-scale", action="store_true", help="without the comparison with sqrtm")
    arguments.add_argument("--processes", type=int, default=1, help="that share precision and recall (%(default)s)")
    options = arguments.parse_args()
    print(f"{machine()}, torch {torch.__version__}, scipy {scipy.__version__}")
    if not options.only_scale:
        keep(options.json, "metrics", frechet(options.samples, options.width, options.rounds))
    size = 8 * options.samples * options.width / 2**30
    print(f"\n{options.samples} × {options.width} features of each set, {size:.2f} GiB of both")
    print("| metric | seconds | peak beyond the features, GiB | value |\n|---|---:|---:|---|")
    for name in options.metric:
        print(at_scale(name, options.samples, options.width), flush=True)
        if name == "precision, recall" and options.processes > 1:
            print(at_scale(name, options.samples, options.width, options.processes), flush=True)


if __name__ == "__main__":
    main()
