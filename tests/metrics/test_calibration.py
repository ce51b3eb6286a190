"""Metrics of a classifier against scikit-learn, torchmetrics, relplot and plain loops over the definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.metrics import brier_score_loss, log_loss, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError

from calib_guidance.metrics import (
    Accuracy,
    AdaptiveCalibrationError,
    BrierScore,
    CalibrationError,
    ClasswiseCalibrationError,
    MaximumCalibrationError,
    NegativeLogLikelihood,
    ReliabilityBins,
    SmoothCalibrationError,
    calibration_error_from_bins,
)
from calib_guidance.training.losses import equal_width_bin

CLASSES = 8
METRICS = {
    "accuracy": Accuracy,
    "top 3": lambda **kwargs: Accuracy(3, **kwargs),
    "nll": NegativeLogLikelihood,
    "brier": BrierScore,
    "ece": CalibrationError,
    "maximum": MaximumCalibrationError,
    "adaptive": AdaptiveCalibrationError,
    "classwise": lambda **kwargs: ClasswiseCalibrationError(CLASSES, **kwargs),
    "smooth": SmoothCalibrationError,
}
# Every metric and its pure function.
PAIRS = {name: (build, build().of) for name, build in METRICS.items()}


def classified(n, temperature, classes=CLASSES, seed=0):
    """Logits and classes; a temperature above 1 makes the labels less sure than the logits say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    y = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)
    return logits, y


def binary(confidence, chance, seed=0):
    """Two-class logits with these confidences in class 0, which is right with that chance."""
    confidence, chance = np.broadcast_arrays(confidence, chance)
    wrong = np.random.default_rng(seed).uniform(size=len(confidence)) >= chance
    logits = torch.zeros(len(confidence), 2, dtype=torch.float64)
    logits[:, 0] = torch.from_numpy(logit(confidence))
    return logits, torch.from_numpy(wrong.astype(int))


def top(logits, y):
    """Confidence and correctness in numpy."""
    confidence, prediction = logits.double().softmax(1).max(1)
    return confidence.numpy(), (prediction == y).double().numpy()


@pytest.fixture(params=[0.5, 1.0, 3.0], ids=["under-confident", "calibrated", "over-confident"])
def data(request):
    return classified(3000, request.param)


class TestAgainstIndependentImplementations:
    def test_accuracy(self, data):
        logits, y = data
        for k in (1, 3, 5):
            expected = top_k_accuracy_score(y, logits, k=k, labels=range(CLASSES))
            assert float(Accuracy(k).of(logits, y)) == pytest.approx(expected, abs=1e-12)

    def test_negative_log_likelihood(self, data):
        logits, y = data
        expected = log_loss(y, logits.double().softmax(1).numpy(), labels=range(CLASSES))
        assert float(NegativeLogLikelihood().of(logits, y)) == pytest.approx(expected, abs=1e-9)

    def test_brier_score(self, data):
        logits, y = data
        p = logits.double().softmax(1).numpy()
        expected = brier_score_loss(y, p, labels=range(CLASSES), scale_by_half=False)
        assert float(BrierScore().of(logits, y)) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("bins", [15, 4])
    def test_calibration_error(self, data, bins):
        expected = MulticlassCalibrationError(CLASSES, n_bins=bins, norm="l1")(data[0].softmax(1), data[1])
        assert float(CalibrationError(bins).of(*data)) == pytest.approx(float(expected), abs=1e-6)

    @pytest.mark.parametrize("bins", [15, 4])
    def test_maximum_calibration_error(self, data, bins):
        expected = MulticlassCalibrationError(CLASSES, n_bins=bins, norm="max")(data[0].softmax(1), data[1])
        assert float(MaximumCalibrationError(bins).of(*data)) == pytest.approx(float(expected), abs=1e-6)

    def test_classwise_calibration_error(self, data):
        p, y = data[0].double().softmax(1).numpy(), data[1].numpy()
        expected = 0.0
        for k in range(CLASSES):
            for b in range(15):
                inside = (p[:, k] > b / 15) & (p[:, k] <= (b + 1) / 15)
                if inside.any():
                    expected += inside.mean() * abs((y[inside] == k).mean() - p[inside, k].mean()) / CLASSES
        assert float(ClasswiseCalibrationError(CLASSES).of(*data)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bins_end_exactly_at_their_edges(dtype):
    """In integers and fractions: k/B is the upper edge of bin k − 1, and the next number above it belongs to bin k."""
    for num_bins in range(1, 101):
        edges = torch.tensor([k / num_bins for k in range(1, num_bins + 1)], dtype=dtype)
        assert equal_width_bin(edges, num_bins).tolist() == list(range(num_bins))
        above, below = (torch.nextafter(edges[:-1], torch.tensor(to, dtype=dtype)) for to in (1, 0))
        for values in (above, below):
            exact = [math.ceil(Fraction(value) * num_bins) - 1 for value in values.tolist()]
            assert equal_width_bin(values, num_bins).tolist() == exact
    assert equal_width_bin(torch.tensor([0.0, 1.0], dtype=dtype), 7).tolist() == [0, 6]


def adaptive_by_sorting(confidence, correct, num_bins=15):
    """Bins of exactly the same mass, a sample at an edge divided between two."""
    order = np.argsort(confidence, kind="stable")
    edges = np.linspace(0, len(order), num_bins + 1)
    residual = np.concatenate([[0], np.cumsum((correct - confidence)[order])])
    return np.abs(np.diff(np.interp(edges, np.arange(len(order) + 1), residual))).sum() / len(order)


class TestAdaptive:
    @pytest.mark.parametrize("n", [500, 3001, 20000])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_is_that_of_sorted_confidences(self, n, temperature):
        """To 0.16/√n: confidences within 0.2 % of each other may count as tied."""
        logits, y = classified(n, temperature, seed=n)
        expected = adaptive_by_sorting(*top(logits, y))
        assert float(AdaptiveCalibrationError().of(logits, y)) == pytest.approx(expected, abs=0.16 / n**0.5)

    def test_separates_what_one_bin_of_equal_width_mixes(self):
        """Half at confidence 0.61, all right, and half at 0.62, all wrong: both in (9/15, 10/15]."""
        logits, y = binary(np.repeat([0.62, 0.61], 50), np.repeat([0, 1], 50))
        assert float(CalibrationError().of(logits, y)) == pytest.approx(0.615 - 0.5, abs=1e-12)
        expected = (0.39 + 0.62) / 2
        assert float(AdaptiveCalibrationError(2).of(logits, y)) == pytest.approx(expected, abs=1e-12)

    def test_ties_do_not_depend_on_their_order(self):
        logits, y = binary(np.full(1000, 0.8), 0.5)
        first = AdaptiveCalibrationError().of(logits, y)
        second = AdaptiveCalibrationError().of(logits, y.sort().values)
        assert float(first) == pytest.approx(float(second), abs=1e-12)
        assert float(first) == pytest.approx(abs(0.8 - float((y == 0).double().mean())), abs=1e-12)


def smooth_by_definition(confidence, correct, points=2001):
    """∫ |mean of K_σ(t, confidence)·(correct − confidence)| dt at its fixed point, reflections summed one by one."""
    t = np.linspace(0, 1, points)
    images = np.concatenate([sign * confidence + 2 * shift for shift in range(-2, 3) for sign in (1, -1)])
    residual = np.tile(correct - confidence, 10)
    order = np.argsort(images)
    images, residual = images[order], residual[order]
    keep = (images > -3) & (images < 4)
    images, residual = images[keep], residual[keep]

    def error(sigma):
        smoothed = np.zeros(points)
        for i, r in zip(np.array_split(images, 20), np.array_split(residual, 20), strict=True):
            smoothed += np.exp(-(((t[:, None] - i) / sigma) ** 2) / 2) @ r
        return np.trapezoid(np.abs(smoothed), t) / (len(confidence) * sigma * np.sqrt(2 * np.pi))

    low, high = 1e-3, 1.0
    for _ in range(13):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return error(low)


def confidences(name, n=600):
    rng = np.random.default_rng(1)
    p = 0.5 + 0.5 * rng.beta(2, 1.5, size=n)
    return {
        "calibrated": (p, p),
        "over-confident": (p, p**2),
        "wavy": (p, np.clip(p + 0.2 * np.sin(25 * p), 0, 1)),
        "at 1": (np.where(rng.uniform(size=n) < 0.5, expit(35.0), p), np.where(rng.uniform(size=n) < 0.5, 0.9, p)),
    }[name]


class TestSmooth:
    @pytest.mark.parametrize("name", ["calibrated", "over-confident", "wavy", "at 1"])
    def test_is_the_definition(self, name):
        """To 2e-4, which is the step of the reference's bisection."""
        logits, y = binary(*confidences(name, n=200))
        expected = smooth_by_definition(*top(logits, y))
        assert float(SmoothCalibrationError().of(logits, y)) == pytest.approx(expected, abs=2e-4)

    @pytest.mark.parametrize("name", ["calibrated", "over-confident", "wavy"])
    def test_is_that_of_relplot(self, name):
        """To 1e-3, the step of relplot's bisection."""
        from relplot import smECE

        logits, y = binary(*confidences(name, n=5000))
        expected = smECE(*top(logits, y))
        assert float(SmoothCalibrationError().of(logits, y)) == pytest.approx(expected, abs=1e-3)

    def test_many_classes_against_relplot(self, data):
        from relplot import smECE

        assert float(SmoothCalibrationError().of(*data)) == pytest.approx(smECE(*top(*data)), abs=1e-3)

    def test_of_the_certain_and_right_is_zero(self):
        logits = torch.tensor([[80.0, -80.0]]).expand(50, 2)
        assert float(SmoothCalibrationError().of(logits, torch.zeros(50, dtype=torch.long))) == 0
        assert float(SmoothCalibrationError().of(logits, torch.ones(50, dtype=torch.long))) == pytest.approx(1)


class TestLevels:
    @pytest.fixture(params=PAIRS)
    def pair(self, request):
        return PAIRS[request.param]

    def test_each_is_the_metric_of_its_samples(self, pair):
        build, function = pair
        logits, y = classified(2000, 2.0)
        level = torch.randint(3, y.shape, generator=torch.Generator().manual_seed(1))
        level[level == 1] = 3  # level 1 has no data
        metric = build(num_levels=4)
        for rows in torch.arange(2000).split(300):
            metric.update(logits[rows], y[rows], level[rows])
        found = metric.compute()
        assert found.overall.dtype == found.by_level.dtype == torch.float64
        assert float(found.overall) == pytest.approx(float(function(logits, y)), abs=1e-9)
        assert found.by_level.shape == (4,)
        assert found.by_level[1].isnan()
        for n in (0, 2, 3):
            rows = level == n
            assert float(found.by_level[n]) == pytest.approx(float(function(logits[rows], y[rows])), abs=1e-9)

    def test_a_number_is_the_level_of_all(self, pair):
        build, function = pair
        logits, y = classified(100, 2.0)
        metric = build(num_levels=2)
        metric.update(logits, y, 1)
        assert float(metric.compute().by_level[1]) == pytest.approx(float(function(logits, y)), abs=1e-9)

    def test_one_keeps_its_axis(self, pair):
        metric = pair[0]()
        metric.update(*classified(100, 2.0))
        found = metric.compute()
        assert found.overall.shape == ()
        assert found.by_level.shape == (1,)
        assert float(found.by_level[0]) == pytest.approx(float(found.overall), abs=1e-12)

    @pytest.mark.filterwarnings("error")
    def test_without_data_everything_is_nan(self, pair):
        metric = pair[0](num_levels=2)
        found = metric.compute()
        assert found.overall.isnan()
        assert found.by_level.isnan().tolist() == [True, True]
        metric.update(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long))
        assert metric.compute().overall.isnan()

    def test_saturated_logits(self, pair):
        """Logits of ±80 in float32 and bfloat16, the largest right for three of four."""
        build, function = pair
        sign = torch.eye(CLASSES)[torch.arange(64) % CLASSES] * 2 - 1
        y = torch.where(torch.arange(64) % 4 == 3, 0, torch.arange(64) % CLASSES)
        for kind in (torch.float32, torch.bfloat16):
            assert torch.isfinite(function((80 * sign).to(kind), y))
            metric = build()
            metric.update((80 * sign).to(kind), y)
            assert torch.isfinite(metric.compute().overall)

    def test_refuses_what_does_not_fit(self, pair):
        logits, y = classified(10, 1.0)
        metric = pair[0](num_levels=2)
        with pytest.raises(ValueError, match=r"logits \(N, K\) and classes \(N,\), got \(10, 8\) and \(10, 1\)"):
            metric.update(logits, y[:, None])
        with pytest.raises(ValueError, match=r"got levels 0 … 2"):
            metric.update(logits, y, torch.arange(10) % 3)
        with pytest.raises(ValueError, match=r"num_levels = 2, levels 0 … 1, got levels -1"):
            metric.update(logits, y, -1)
        with pytest.raises(ValueError, match=r"each of 10 samples, got \(4,\)"):
            metric.update(logits, y, torch.zeros(4, dtype=torch.long))
        with pytest.raises(ValueError, match="num_levels must be at least 1, got 0"):
            pair[0](num_levels=0)


def test_values_of_saturated_logits():
    """Sure of class 0 in four rows, which is right in three."""
    logits = torch.tensor([[80.0, -80.0]]).expand(4, 2)
    y = torch.tensor([0, 0, 0, 1])
    assert float(NegativeLogLikelihood().of(logits, y)) == pytest.approx(160 / 4)
    assert float(BrierScore().of(logits, y)) == pytest.approx(2 / 4)
    for name in ("ece", "maximum", "adaptive", "smooth"):
        assert float(PAIRS[name][1](logits, y)) == pytest.approx(0.25, abs=1e-9), name


@pytest.mark.parametrize("name", PAIRS)
def test_logits_that_are_not_numbers_show(name):
    """As wrong answers in accuracies, as NaN elsewhere."""
    logits, y = classified(50, 1.0)
    bad = logits.clone()
    bad[3] = torch.nan
    found = PAIRS[name][1](bad, y)
    if name in ("accuracy", "top 3"):
        rows = torch.arange(50) != 3
        assert float(found) == pytest.approx(float(PAIRS[name][1](logits[rows], y[rows])) * 49 / 50)
    else:
        assert found.isnan()


def test_ties_go_to_the_class_that_calibration_counts_by():
    logits, y = torch.zeros(4, 4), torch.arange(4)
    assert [float(Accuracy(k).of(logits, y)) for k in (1, 2, 4)] == [0.25, 0.5, 1]
    correct = ReliabilityBins().of(logits, y)[:, 2].sum()
    assert float(correct) == 1


def test_bins_are_those_of_the_error():
    logits, y = classified(1000, 2.0)
    level = torch.arange(1000) % 2
    bins, error = ReliabilityBins(num_levels=2), CalibrationError(num_levels=2)
    bins.update(logits, y, level)
    error.update(logits, y, level)
    sums = bins.compute()
    assert sums.overall.shape == (15, 3)
    assert sums.by_level.shape == (2, 15, 3)
    torch.testing.assert_close(calibration_error_from_bins(sums.overall), error.compute().overall)
    torch.testing.assert_close(calibration_error_from_bins(sums.by_level), error.compute().by_level)
    torch.testing.assert_close(sums.overall, ReliabilityBins().of(logits, y))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CalibrationError(num_bins=0), r"num_bins .* at least 1, got \(0,\)"),
        (lambda: AdaptiveCalibrationError(num_bins=0), "num_bins must be at least 1, got 0"),
        (lambda: ClasswiseCalibrationError(4).update(*classified(3, 1.0)), r"num_classes is 4, .* \(3, 8\)"),
        (lambda: Accuracy(9).update(*classified(3, 1.0)), r"top_k must lie in \[1, 8\].*got 9"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
