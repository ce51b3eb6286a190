"""Smooth ECE, by sample and by bin, against formulas, finite differences and the metric."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from calib_guidance.metrics import CalibrationError
from calib_guidance.training import binned_smooth_ece, smooth_ece

LOSSES = [smooth_ece, binned_smooth_ece]


def batch(n=200, classes=4, spread=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, classes, dtype=dtype, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


def numpy_bins(logits, y, bins=15):
    """(fraction of samples, mean confidence − accuracy) of each bin that has samples, sample by sample."""
    found = [[] for _ in range(bins)]
    for row, label in zip(logits.double().softmax(1).numpy(), y.tolist(), strict=True):
        confidence = row.max()
        found[min(max(math.ceil(confidence * bins) - 1, 0), bins - 1)].append(confidence - (row.argmax() == label))
    return [(len(gaps) / len(y), np.mean(gaps)) for gaps in found if gaps]


def test_smooth_ece_is_its_formula():
    logits, y = batch(50)
    p = logits.softmax(1).numpy()
    expected = np.mean([math.sqrt((p[i].max() - (p[i].argmax() == y[i].item())) ** 2 + 0.02) for i in range(50)])
    assert float(smooth_ece(logits, y, 0.02)) == pytest.approx(expected, rel=1e-12)
    assert float(smooth_ece(logits.float(), y, 0.02)) == pytest.approx(expected, rel=1e-6)
    assert math.sqrt(0.02) <= expected <= math.sqrt(1.02)


def test_binned_is_its_formula():
    logits, y = batch()
    expected = sum(share * math.sqrt(gap**2 + 0.02) for share, gap in numpy_bins(logits, y))
    assert float(binned_smooth_ece(logits, y, 0.02)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_binned_goes_to_the_ece_as_beta_goes_to_zero(bins):
    logits, y = batch(dtype=torch.float32)
    found = float(binned_smooth_ece(logits, y, 1e-16, bins))
    assert found == pytest.approx(float(CalibrationError(bins).of(logits, y)), rel=1e-6)
    assert found == pytest.approx(sum(share * abs(gap) for share, gap in numpy_bins(logits, y, bins)), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0])
def test_gradients_are_those_of_finite_differences(loss, beta):
    logits, y = batch(60)
    edges = (logits.softmax(1).max(1).values * 15 + 0.5).frac() - 0.5  # distance to the next edge, of width 1
    logits, y = logits[edges.abs() > 1e-3], y[edges.abs() > 1e-3]
    assert len(y) > 50
    assert torch.autograd.gradcheck(lambda logits: loss(logits, y, beta), logits.requires_grad_(), atol=1e-7)


def test_a_bin_of_one_sample_is_a_term_of_the_loss_per_sample():
    logits, y = batch(1)
    assert float(binned_smooth_ece(logits, y)) == pytest.approx(float(smooth_ece(logits, y)), rel=1e-12)


def test_gradient_lowers_confidence_where_it_is_wrong_and_raises_it_where_right():
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(smooth_ece(logits, torch.tensor([0, 1])), logits)
    assert gradient[0, 0] < 0 < gradient[1, 0]  # descent raises the first and lowers the second


def test_binned_moves_the_complete_bin_by_its_gap():
    """Right or wrong, samples of a bin go the same way; at a gap of zero they stay."""
    confident = torch.tensor([[math.log(3.0), 0.0]] * 4, dtype=torch.float64, requires_grad=True)  # p̂ = 3/4
    for right, sign in ((4, -1), (3, 0), (1, 1)):
        y = torch.tensor([0] * right + [1] * (4 - right))
        (gradient,) = torch.autograd.grad(binned_smooth_ece(confident, y, 1e-4), confident)
        assert gradient[:, 0].round(decimals=12).sign().tolist() == [sign] * 4


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits_and_half_precision(loss, dtype):
    logits = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 0.0], [0.1, 0.2, 0.3]], dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 2, 2])
    value = loss(logits, y)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(loss(logits.detach().double(), y)), rel=1e-6)
    assert gradient.isfinite().all()
    assert gradient[2].any()
    assert gradient[:2].float().abs().max() < 1e-30  # softmax is flat there, whatever the loss says


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(loss, beta):
    with pytest.raises(ValueError, match="β.*above 0"):
        loss(*batch(4), beta)


def test_there_is_at_least_one_bin():
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        binned_smooth_ece(*batch(4), num_bins=0)


def best_confidence(loss, accuracy, beta, n=1000):
    """Confidence at which the loss of n equal samples is least, a fraction ``accuracy`` of them right."""
    y = (torch.arange(n) >= round(accuracy * n)).long()

    def at(p):
        logits = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64).expand(n, 2)
        return float(loss(logits, y, beta))

    return minimize_scalar(at, bounds=(0.501, 0.9999), method="bounded", options={"xatol": 1e-6}).x


@pytest.mark.parametrize("q", [0.6, 0.7, 0.9])
def test_what_each_form_takes_for_calibrated(q):
    """By sample the least loss is over-confident by what the docstring says; by bin it is at the accuracy."""
    small, large = 1e-4, 10.0
    excess = math.sqrt(small) * (1 - q) / math.sqrt(2 * q - 1)
    assert 1 - best_confidence(smooth_ece, q, small) == pytest.approx(excess, rel=0.02)
    excess = q * (1 - q) * (2 * q - 1) / (2 * large)
    assert best_confidence(smooth_ece, q, large) - q == pytest.approx(excess, rel=0.1)
    assert best_confidence(binned_smooth_ece, q, small) == pytest.approx(q, abs=1e-4)
