"""MIND, CMMD, risk–coverage, signed ECE and splits of scores, against golden data, scikit-learn and closed forms."""

import math

import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F

from calib_guidance.metrics import (
    AreaUnderRiskCoverage,
    CalibrationError,
    OverconfidenceError,
    SignedCalibrationError,
    aurc,
    clip_mmd,
    mind,
    risk_coverage,
    split_brier,
    split_nll,
)
from calib_guidance.metrics.selective import aurc_of_oracle


@pytest.fixture(scope="module")
def parts(golden):
    return golden("small_parts")


@pytest.fixture(scope="module")
def predictions():
    """Logits of an over-confident classifier, and classes drawn from the true law: its temperature is 1.8."""
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 10, generator=generator)
    y = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    return 1.8 * true, y, true


def test_mind(parts):
    a, b = parts["mind_a"], parts["mind_b"]
    assert float(mind(a[: len(b)], b)) == pytest.approx(float(parts["mind_equal_n"]), rel=1e-6)
    assert float(mind(a, b)) == pytest.approx(float(parts["mind_unequal_n"]), rel=1e-6)
    with pytest.raises(ValueError, match="needs a sample in each set, got 0 and 260"):
        mind(a[:0], b)


def test_cmmd(parts):
    assert float(clip_mmd(parts["mind_a"], parts["mind_b"])) == pytest.approx(float(parts["cmmd"]), rel=1e-6)
    # Against scikit-learn's kernel, in one piece.
    x, y = (F.normalize(parts[name].double()).numpy() for name in ("mind_a", "mind_b"))
    rbf = sklearn.metrics.pairwise.rbf_kernel
    expected = 1000 * (rbf(x, gamma=0.005).mean() + rbf(y, gamma=0.005).mean() - 2 * rbf(x, y, gamma=0.005).mean())
    assert float(clip_mmd(parts["mind_a"], parts["mind_b"])) == pytest.approx(expected, rel=1e-9)


def test_risk_coverage_averages_ties():
    # Of the three at 0.5 one is right: each of these places has a mean error of 2/3 whatever the order.
    confidence, correct = torch.tensor([0.9, 0.5, 0.5, 0.5]), torch.tensor([1, 1, 0, 0])
    coverage, risk = risk_coverage(confidence, correct)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, (2 / 3) / 2, (4 / 3) / 3, 2 / 4])
    constant = torch.full((1000,), 0.5), torch.arange(1000) % 4 > 0
    assert float(aurc(*constant)) == pytest.approx(0.25)  # random order: the error rate


def test_the_oracle_is_the_limit_of_perfect_order():
    n, r = 200_000, 0.3
    correct = (torch.arange(n) < (1 - r) * n).double()
    found = aurc(torch.linspace(1, 0, n, dtype=torch.float64), correct)
    assert float(found) == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-5)
    assert float(aurc_of_oracle(torch.tensor(1.0))) == 1


def test_area_from_the_histogram(predictions):
    logits, y, _ = predictions
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == y).double()
    exact = float(aurc(confidence, correct))
    metric, excess = AreaUnderRiskCoverage(), AreaUnderRiskCoverage(excess=True)
    assert float(metric.of(logits, y)) == pytest.approx(exact, abs=2e-4)
    oracle = float(aurc_of_oracle(1 - correct.mean()))
    assert float(excess.of(logits, y)) == pytest.approx(exact - oracle, abs=2e-4)
    metric.update(logits[:1000], y[:1000])
    metric.update(logits[1000:], y[1000:])
    assert float(metric.compute().overall) == pytest.approx(float(metric.of(logits, y)))


def test_signed_error_and_its_sides(predictions):
    logits, y, true = predictions
    confidence, predicted = logits.double().softmax(1).max(1)
    signed = SignedCalibrationError().of(logits, y)
    assert float(signed) == pytest.approx(float(confidence.mean() - (predicted == y).double().mean()))
    assert float(signed) > 0.05
    over, ece = OverconfidenceError().of(logits, y), CalibrationError().of(logits, y)
    assert float(2 * over - signed) == pytest.approx(float(ece))
    assert abs(float(SignedCalibrationError().of(true, y))) < 0.02


def test_likelihood_is_split_by_the_true_temperature(predictions):
    logits, y, true = predictions
    split = split_nll(logits, y)
    assert float(split.temperature) == pytest.approx(1.8, rel=0.05)
    entropy = -(true.softmax(1) * true.log_softmax(1)).sum(1).mean()
    assert float(split.refinement) == pytest.approx(float(entropy), abs=0.03)
    assert float(split.nll) == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert float(split.calibration) > 0.05
    apart = split_nll(logits[2000:], y[2000:], (logits[:2000], y[:2000]))
    assert float(apart.calibration + apart.refinement) == pytest.approx(float(apart.nll))
    assert float(apart.refinement) >= float(split_nll(logits[2000:], y[2000:]).refinement)


def test_brier_score_is_the_sum_of_its_parts(predictions):
    logits, y, _ = predictions
    confidence, predicted = logits.double().softmax(1).max(1)
    split = split_brier(confidence, predicted == y)
    parts = split.reliability - split.resolution + split.uncertainty + split.within_bins
    theirs = sklearn.metrics.brier_score_loss((predicted == y).numpy(), confidence.numpy())
    assert float(split.brier) == pytest.approx(theirs)
    assert float(parts) == pytest.approx(theirs, rel=1e-12)
    one = split_brier(torch.full((4,), 0.25), torch.tensor([1, 0, 0, 0]))
    assert [float(one.reliability), float(one.resolution), float(one.uncertainty)] == [0, 0, 0.1875]
