"""What metrics of samples cost: Fréchet distance at 2048 dimensions, memory of distances between 10,000 and 10,000 samples.

    python benchmarks/metrics.py

The Fréchet distances take turns with that by scipy.linalg.sqrtm, on features that are correlated and not negative, as Inception's
are, so that a drift of the machine's speed meets all of them. The peak of memory is that of a process which does nothing
else, with the features, as the operating system counts it.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from timing import Ratio, in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.metrics import covariance_root, frechet_distance, mean_and_covariance, precision_recall


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


def memory(samples: int, width: int) -> None:
    """Print time and peak memory of precision and recall."""
    reference, generated = features(samples, width, 1), features(samples, width, 2)
    before = peak()
    started = time.perf_counter()
    precision, recall = precision_recall(reference, generated)
    seconds = time.perf_counter() - started
    print(
        f"Precision {precision:.4f} and recall {recall:.4f} of {samples} × {samples} × {width}: {seconds:.0f} s, "
        f"peak memory {peak():.2f} GiB ({before:.2f} GiB before)"
    )


def peak() -> float:
    """Largest memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the ratios."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--samples", type=int, default=10_000)
    arguments.add_argument("--width", type=int, default=2048)
    options = arguments.parse_args()
    print(f"{machine()}, torch {torch.__version__}, scipy {scipy.__version__}")
    keep(options.json, "metrics", frechet(options.samples, options.width, options.rounds))
    # In its own process, whose peak nothing before has raised.
    measured = multiprocessing.get_context("spawn").Process(target=memory, args=(options.samples, options.width))
    measured.start()
    measured.join()
    raise SystemExit(measured.exitcode)


if __name__ == "__main__":
    main()
