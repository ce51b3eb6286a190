"""Differences of paired samples against the paired t-test, the binomial law, and simulated pairs of a known difference."""

import numpy as np
import pytest
import scipy.stats
import torch

from calib_guidance.metrics import (
    frechet_distance,
    jackknife_blocks,
    mean_difference,
    paired_difference,
    sign_test,
)


def without_each(values):
    return (values.sum() - values) / (len(values) - 1)


def test_of_means_it_is_the_paired_t_test():
    a, b = (torch.randn(25, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    b = a + 0.2 * b
    found = paired_difference((float(a.mean()), float(b.mean())), (without_each(a), without_each(b)))
    theirs = scipy.stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))
    independent = ((a.var() + b.var()) / 25).sqrt()
    assert found.unpaired_std == pytest.approx(float(independent))
    assert found.distinguishable == (theirs.low > 0 or theirs.high < 0)
    quantiles = scipy.stats.t.ppf([0.975, 0.8], 24)
    assert found.resolvable == pytest.approx(quantiles.sum() * found.std)


def test_the_bias_of_few_samples_is_removed():
    # The variance with divisor n is biased by −σ²/n exactly; the jackknife of single samples makes the unbiased one of it.
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    deleted = torch.stack([x[torch.arange(12) != i].var(correction=0) for i in range(12)])
    zero = torch.zeros(12)
    found = paired_difference((float(x.var(correction=0)), 0.0), (deleted, zero), unbias=True)
    assert found.value == pytest.approx(float(x.var()))


def test_pairs_of_runs_are_averaged():
    one = paired_difference((1.0, 0.0), (torch.tensor([1.0, 1.2, 0.8]), torch.zeros(3)))
    two = mean_difference([one, one], 3)
    assert two.value == pytest.approx(one.value)
    assert two.std == pytest.approx(one.std / np.sqrt(2))
    assert two.high - two.value == pytest.approx(scipy.stats.t.ppf(0.975, 4) * two.std)


@pytest.mark.parametrize("differences", [[1, 2, 3, -1, 2, 0], [1.0], [-1, -2, -3, -4, -5, -6], [1, -1]])
def test_sign_test(differences):
    signs = [d for d in differences if d]
    expected = scipy.stats.binomtest(sum(d > 0 for d in signs), len(signs)).pvalue
    assert sign_test(differences) == pytest.approx(expected)


def test_blocks_hold_the_classes_in_proportion():
    labels = torch.arange(120) % 10
    blocks = jackknife_blocks(labels, 6)
    counts = torch.zeros(6, 10).index_put((blocks, labels), torch.ones(120), accumulate=True)
    assert counts.unique().tolist() == [2.0]
    for wrong in (1, 121):
        with pytest.raises(ValueError, match=f"blocks must be from 2 to 120, the number of samples, got {wrong}"):
            jackknife_blocks(labels, wrong)


def simulated_pair(generator, n, d, groups):
    """Fréchet distances of two sets of common noise to N(0, 1), complete and without each block; their true difference."""
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)

    def distance(count, total, square):
        return frechet_distance(
            zero, eye, total / count, (square - torch.outer(total, total) / count) / (count - 1), eye
        )

    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    other = (z + 0.15 * torch.randn(n, d, generator=generator, dtype=torch.float64)) / 1.0225**0.5
    values, without, true = [], [], []
    for noise, std, shift in ((z, 1.0, 0.1), (other, 1.05, 0.13)):
        blocks = (std * noise + shift).view(groups, -1, d)
        total, square = blocks.sum(1), torch.einsum("bni,bnj->bij", blocks, blocks)
        values.append(float(distance(n, total.sum(0), square.sum(0))))
        left = [
            distance(n - n // groups, total.sum(0) - t, square.sum(0) - s) for t, s in zip(total, square, strict=True)
        ]
        without.append(torch.stack(left))
        true.append(d * ((std - 1) ** 2 + shift**2))
    return values, without, true[0] - true[1]


def test_intervals_cover_a_known_difference():
    """A small form of docs/cost_of_a_number.py, which draws 200 pairs."""
    generator, covered, ratio = torch.Generator().manual_seed(0), [], []
    for _ in range(60):
        values, without, true = simulated_pair(generator, 400, 6, 20)
        found = paired_difference(tuple(values), tuple(without), unbias=True)
        covered.append(found.low <= true <= found.high)
        ratio.append(found.unpaired_std / found.std)
    assert 0.88 <= np.mean(covered) <= 1  # 95 % of 60: a binomial deviation of 3 %
    assert np.median(ratio) > 3
