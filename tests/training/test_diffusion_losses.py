"""The diffusion losses against their formulas."""

import math

import pytest
import torch
from scipy.stats import norm

from calib_guidance.training.losses import discretized_gaussian_nll, gaussian_kl, variational_bound_term


def test_kl_of_normals():
    a = torch.distributions.Normal(0.3, 1.4)
    b = torch.distributions.Normal(-0.2, 0.7)
    logs = [torch.tensor(2 * math.log(s)) for s in (1.4, 0.7)]
    found = gaussian_kl(torch.tensor(0.3), logs[0], torch.tensor(-0.2), logs[1])
    torch.testing.assert_close(found, torch.distributions.kl_divergence(a, b))


def test_discretized_likelihood_sums_to_one_over_the_gray_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = discretized_gaussian_nll(levels, torch.full_like(levels, 0.2), torch.full_like(levels, -3.0))
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-9)
    middle = norm.cdf(levels[100] + 1 / 255, 0.2, math.exp(-1.5)) - norm.cdf(levels[100] - 1 / 255, 0.2, math.exp(-1.5))
    assert float((-nll[100]).exp()) == pytest.approx(middle, rel=1e-9)


def test_a_perfect_model_has_no_divergence_and_bits_are_base_two():
    x, zero = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    first = torch.tensor([False, True])
    term = variational_bound_term(x, zero, zero, zero, zero, first)
    assert float(term[0]) == 0
    assert float(term[1]) == pytest.approx(float(discretized_gaussian_nll(x, zero, zero).mean()) / math.log(2))
    shifted = variational_bound_term(x, zero, zero, zero + 1, zero, first)
    assert float(shifted[0]) == pytest.approx(0.5 / math.log(2))
