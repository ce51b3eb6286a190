"""How often the intervals of `compare-runs` hold a known difference, and how much shorter common noise makes them.

    python benchmarks/paired_coverage.py

Two sets of normal features, whose Fréchet distances to N(0, 1) are known exactly, are made from noise that correlates by 0.99, as
the samples of two guidance rules do. Pairs with independent noise have the same marginals.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from calib_guidance.metrics import PairedDifference, frechet_distance, paired_difference

STDS, SHIFTS = (1.0, 1.05), (0.1, 0.13)  # of the two sets


class Coverage(NamedTuple):
    """Of many pairs: fractions of intervals that hold the true difference, and a ratio of lengths."""

    unbiased: float
    plain: float  # without removing the bias of few samples
    shorter: float  # unpaired over paired standard error, median


def simulated_pair(generator: torch.Generator, n: int, d: int, blocks: int) -> tuple[list[float], list[Tensor], float]:
    """Distances of two sets of common noise, complete ``(2,)`` and without each block ``(2, blocks)``; the true difference."""
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)

    def distance(count: int, total: Tensor, square: Tensor) -> Tensor:
        covariance = (square - torch.outer(total, total) / count) / (count - 1)
        return frechet_distance(zero, eye, total / count, covariance, eye)

    z, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    values, without, true = [], [], []
    for noise, std, shift in zip((z, (z + 0.15 * other) / 1.0225**0.5), STDS, SHIFTS, strict=True):
        parts = (std * noise + shift).view(blocks, -1, d)
        total, square = parts.sum(1), torch.einsum("bni,bnj->bij", parts, parts)
        all_total, all_square, left = total.sum(0), square.sum(0), n - n // blocks
        values.append(float(distance(n, all_total, all_square)))
        deleted = (distance(left, all_total - t, all_square - s) for t, s in zip(total, square, strict=True))
        without.append(torch.stack(list(deleted)))
        true.append(d * ((std - 1) ** 2 + shift**2))
    return values, without, true[0] - true[1]


def coverage(pairs: int, n: int, d: int, blocks: int, seed: int = 0) -> Coverage:
    """Of ``pairs`` simulated pairs of ``n`` samples with ``d`` features; n is a multiple of ``blocks``."""
    generator, held, ratios = torch.Generator().manual_seed(seed), torch.zeros(2), []
    for _ in range(pairs):
        values, without, true = simulated_pair(generator, n, d, blocks)
        found: list[PairedDifference] = [
            paired_difference(tuple(values), tuple(without), unbias) for unbias in (True, False)
        ]
        held += torch.tensor([each.low <= true <= each.high for each in found])
        ratios.append(found[0].unpaired_std / found[0].std)
    unbiased, plain = (held / pairs).tolist()
    return Coverage(unbiased, plain, float(torch.tensor(ratios).median()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="simulated for each row (%(default)s)")
    parser.add_argument("--blocks", type=int, default=30, help="of the jackknife (%(default)s)")
    options = parser.parse_args()
    print("| features | samples | covered | without bias correction | times shorter |\n|---:|---:|---:|---:|---:|")
    for d, n in ((12, 3000), (12, 600), (32, 600), (64, 540)):
        found = coverage(options.pairs, n // options.blocks * options.blocks, d, options.blocks)
        print(f"| {d} | {n:,} | {found.unbiased:.1%} | {found.plain:.1%} | {found.shorter:.1f} |", flush=True)


if __name__ == "__main__":
    main()
