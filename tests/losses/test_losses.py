"""Smooth ECE and the diffusion losses against their formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from calib_guidance.losses import smooth_ece
from calib_guidance.losses.diffusion import discretised_gaussian_nll, gaussian_kl, variational_bound_term


def test_smooth_ece_is_its_formula():
    logits = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 4
    p = logits.softmax(1).numpy()
    expected = np.mean([math.sqrt((p[i].max() - (p[i].argmax() == y[i].item())) ** 2 + 0.02) for i in range(50)])
    assert float(smooth_ece(logits, y, 0.02)) == pytest.approx(expected, rel=1e-6)
    assert math.sqrt(0.02) <= expected <= math.sqrt(1.02)


def test_smooth_ece_gradient_lowers_confidence_where_it_is_wrong_and_raises_it_where_right():
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(smooth_ece(logits, torch.tensor([0, 1])), logits)
    assert gradient[0, 0] < 0 < gradient[1, 0]  # descent raises the first and lowers the second
    eps = 1e-3
    for row, column in [(0, 0), (1, 0), (1, 2)]:
        step = torch.zeros(2, 3)
        step[row, column] = eps
        y = torch.tensor([0, 1])
        difference = ((smooth_ece(logits + step, y) - smooth_ece(logits - step, y)) / (2 * eps)).detach()
        assert float(gradient[row, column]) == pytest.approx(float(difference), rel=1e-2, abs=1e-4)


def test_kl_of_normals():
    a = torch.distributions.Normal(0.3, 1.4)
    b = torch.distributions.Normal(-0.2, 0.7)
    logs = [torch.tensor(2 * math.log(s)) for s in (1.4, 0.7)]
    found = gaussian_kl(torch.tensor(0.3), logs[0], torch.tensor(-0.2), logs[1])
    torch.testing.assert_close(found, torch.distributions.kl_divergence(a, b))


def test_discretised_likelihood_sums_to_one_over_the_grey_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = discretised_gaussian_nll(levels, torch.full_like(levels, 0.2), torch.full_like(levels, -3.0))
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-9)
    middle = norm.cdf(levels[100] + 1 / 255, 0.2, math.exp(-1.5)) - norm.cdf(levels[100] - 1 / 255, 0.2, math.exp(-1.5))
    assert float((-nll[100]).exp()) == pytest.approx(middle, rel=1e-9)


def test_a_perfect_model_has_no_divergence_and_bits_are_base_two():
    x, zero = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    first = torch.tensor([False, True])
    term = variational_bound_term(x, zero, zero, zero, zero, first)
    assert float(term[0]) == 0
    assert float(term[1]) == pytest.approx(float(discretised_gaussian_nll(x, zero, zero).mean()) / math.log(2))
    shifted = variational_bound_term(x, zero, zero, zero + 1, zero, first)
    assert float(shifted[0]) == pytest.approx(0.5 / math.log(2))
