"""Differences of paired samples against the paired t-test, the binomial law, and simulated pairs of a known difference."""

import importlib
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from calib_guidance.metrics import (
    jackknife_blocks,
    mean_difference,
    paired_difference,
    samples_to_resolve,
    sign_test,
)
from tests.conftest import ROOT


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


def test_intervals_cover_a_known_difference(monkeypatch):
    """A small form of benchmarks/paired_coverage.py, which draws 200 pairs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("paired_coverage").coverage(60, 400, 6, 20)
    sys.modules.pop("paired_coverage")
    assert 0.88 <= found.unbiased <= 1  # 95 % of 60: a binomial deviation of 3 %
    assert found.shorter > 3


def test_so_many_samples_resolve_a_difference():
    """The power of a two-sided z-test of two means with that many samples, whose errors fall as 1/√N."""
    value, std, count = 3.0, 0.4, 500
    needed = samples_to_resolve(value, std, count, 0.1)
    error = std * np.sqrt(2 * count / needed)
    power = scipy.stats.norm.sf(scipy.stats.norm.ppf(0.975) - 0.1 * value / error)
    assert power == pytest.approx(0.8, abs=1e-4)
