"""Scores against closed forms, high-precision golden data and finite differences."""

import math

import pytest
import torch
from torch import nn

from calib_guidance.guidance.classifier_guidance import input_gradient
from calib_guidance.scores import (
    DIVERGENCES,
    DivergenceRegularized,
    EntropyRegularized,
    TemperedLogProb,
    Tilted,
    entropy,
)

SCORES = [
    TemperedLogProb(),
    TemperedLogProb(1.0, 0.5),
    TemperedLogProb(1.0, 0.0),
    *(DivergenceRegularized(name, 0.3, 0.1, 1.0, 0.5) for name in DIVERGENCES),
    EntropyRegularized(0.5, "constant"),
    EntropyRegularized(0.5, "linear"),
    EntropyRegularized(0.5, "cosine"),
    EntropyRegularized(0.5, "confidence"),
    Tilted(-0.2, 4),
    Tilted(2.0, 2, DivergenceRegularized("js")),
]


def describe(score):
    return " ".join([type(score).__name__, *(f"{v}" for v in vars(score).values() if isinstance(v, (str, float)))])


@pytest.mark.parametrize("fixture_name", ["fdiv_random", "fdiv_extreme"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_match_high_precision(golden, fixture_name, dtype):
    """The extreme fixture has logits of ±80, exact to 70 digits."""
    fixture = golden(fixture_name)
    tolerance = fixture.json["tolerance"]
    if dtype == torch.float32:
        tolerance = tolerance["if computed in float32"]
    for key, s in fixture.json["settings"].items():
        logits = fixture["logits"].to(dtype).requires_grad_()
        if s["kind"] == "entropy":
            kind = EntropyRegularized(s["lam"], "constant", s["tau1"], s["tau2"])
        else:
            kind = DivergenceRegularized(s["kind"], s["alpha"], 0.5, s["tau1"], s["tau2"])
            kind.epsilon = s["epsilon"]  # both ends, which the constructor refuses, among them
        score = kind(logits, fixture["labels"])
        (gradient,) = torch.autograd.grad(score.sum(), logits)
        for name, value in (("score", score), ("grad", gradient)):
            torch.testing.assert_close(
                value.double(),
                fixture[f"{key}.{name}"],
                **tolerance[f"*.{name}"],
                msg=lambda m, k=key, n=name: f"{k}.{n}: {m}",
            )


@pytest.mark.parametrize("score", SCORES, ids=describe)
def test_gradients_match_finite_differences(score):
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 5, 3])
    if getattr(score, "weighting", None) == "confidence":
        # λ_t is a constant to the gradient, so it is held fixed in the differences too.
        weight = score.weight(logits, 1.0)
        (found,) = torch.autograd.grad(score(logits, y).sum(), logits)
        (expected,) = torch.autograd.grad((TemperedLogProb()(logits, y) + weight * entropy(logits)).sum(), logits)
        torch.testing.assert_close(found, expected)
        score = lambda f, y, t: TemperedLogProb()(f, y) + weight * entropy(f)  # noqa: E731
    assert torch.autograd.gradcheck(lambda f: score(f, y, 0.4), logits)


@pytest.mark.parametrize("score", SCORES, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_under_autocast_with_saturated_logits(score, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    x = (torch.randn(4, 6) * 300).requires_grad_()
    with torch.autocast("cpu", dtype):
        logits = layer(x)
        value = score(logits, torch.tensor([0, 1, 2, 3]), 0.7)
    assert logits.dtype == dtype
    assert logits.abs().max() > 80
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_reverse_kl_gradient_is_q_minus_p():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 2, 4])
    score = DivergenceRegularized("rkl", alpha=1.0, epsilon=0.3)(logits, y) - TemperedLogProb()(logits, y)
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    q = torch.full((3, 5), 0.7 / 5, dtype=torch.float64)
    q[range(3), y] += 0.3
    torch.testing.assert_close(gradient, q - logits.softmax(1))


SATURATED = [
    *(TemperedLogProb(1.0, tau2) for tau2 in (1.0, 0.5, 0.0)),
    *(DivergenceRegularized(name, 0.3, epsilon) for name in DIVERGENCES for epsilon in (0.1, 0.9)),
    *(EntropyRegularized(0.5, weighting) for weighting in ("constant", "confidence")),
    Tilted(-0.2, 2),
]


@pytest.mark.parametrize("score", SATURATED, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_direction_of_a_sure_classifier_is_that_of_float64(score, dtype):
    """Log-odds of 10 to 40, of the class and against it: PyTorch's own log_softmax loses 1 − p_y from 16.6 on."""
    log_odds, y = torch.arange(10.0, 41.0), torch.tensor([3]).expand(62)
    logits = torch.randn(31, 10, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits[:, [0, 1, 2, *range(4, 10)]].logsumexp(1) + log_odds
    logits = torch.cat([logits, logits.roll(1, 1)]).to(dtype).float()  # what this type holds of them
    # As guidance takes it: what a classifier in half precision carries back is scaled on the way.
    source = logits.clone().requires_grad_()
    found = input_gradient(lambda f: score(f, y), source.to(dtype), source).double()
    exact = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(score(exact, y).sum(), exact)
    assert (expected.abs().amax(1) > 0).all()
    size = expected.abs().amax(1, keepdim=True)
    assert torch.cosine_similarity(found / size, expected / size).min() > 0.999
    error = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]  # a few roundings of the type
    torch.testing.assert_close(found / size, expected / size, atol=error, rtol=0)


@pytest.mark.parametrize("score", [TemperedLogProb(1.0, 0.5), DivergenceRegularized("js"), EntropyRegularized()])
def test_a_single_class_has_no_gradient_of_its_probability(score):
    logits = torch.tensor([[3.0], [-7.0]], requires_grad=True)
    value = score(logits, torch.zeros(2, dtype=torch.long))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(gradient, torch.full((2, 1), score.tau1 - score.tau2))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_peaked_target_pushes_the_class_up_and_a_flat_one_down(name):
    """Against the plain score, while p_y lies between the two targets' probabilities, 0.19 and 0.91 of ten classes."""
    p = torch.tensor([0.25, 0.5, 0.85], dtype=torch.float64)
    logits = torch.cat([p.log()[:, None], ((1 - p) / 9).log()[:, None].expand(3, 9)], 1).requires_grad_()
    y = torch.zeros(3, dtype=torch.long)

    def push(score):
        return torch.autograd.grad(score(logits, y).sum(), logits)[0][:, 0]

    plain = push(TemperedLogProb())
    torch.testing.assert_close(plain, 1 - p)
    assert (push(DivergenceRegularized(name, 0.5, 0.9)) > plain).all()
    assert (push(DivergenceRegularized(name, 0.5, 0.1)) < plain).all()
    assert torch.equal(push(DivergenceRegularized(name, 0.5)), push(DivergenceRegularized(name, 0.5, 0.9)))
    if name == "rkl":  # ∇_f KL(q‖p) = p − q
        for epsilon in (0.1, 0.9):
            q = (1 - epsilon) / 10 + epsilon
            torch.testing.assert_close(push(DivergenceRegularized(name, 0.5, epsilon)), 1 - p + 0.5 * (q - p))


def test_marginal_temperature_zero_leaves_the_joint_energy():
    logits = torch.randn(2, 5, dtype=torch.float64)
    y = torch.tensor([1, 4])
    joint = logits[range(2), y] - math.log(5)
    torch.testing.assert_close(TemperedLogProb(1.0, 0.0)(logits, y), joint)


def test_entropy_weights_follow_the_trajectory():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    for weighting, half in (("constant", 0.4), ("linear", 0.2), ("cosine", 0.2)):
        score = EntropyRegularized(0.4, weighting)
        assert float(score.weight(logits, 1.0)) == pytest.approx(0.4)
        assert float(score.weight(logits, 0.5)) == pytest.approx(half)
        assert float(score.weight(logits, 0.0)) == pytest.approx(0.4 if weighting == "constant" else 0.0)
    confident, unsure = EntropyRegularized(0.4, "confidence").weight(logits, 1.0)
    assert confident > 0.39 > 0.01 > unsure >= 0
    torch.testing.assert_close(confident, 0.4 * (1 - entropy(logits)[0] / math.log(3)))


class TestTilted:
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.arange(8) % 5

    def gradient(self, score, rows=slice(None)):
        logits = self.logits[rows].clone().requires_grad_()
        return torch.autograd.grad(score(logits, self.y[rows]).sum(), logits)[0]

    def test_each_gradient_is_weighted_by_its_fraction_of_the_group(self):
        plain, values = self.gradient(TemperedLogProb()), TemperedLogProb()(self.logits, self.y)
        weights = (values.view(2, 4) * -0.7).softmax(1).flatten() * 4
        torch.testing.assert_close(self.gradient(Tilted(-0.7, 4)), plain * weights[:, None])

    def test_no_tilt_is_plain_guidance(self):
        torch.testing.assert_close(self.gradient(Tilted(1e-7, 4)), self.gradient(TemperedLogProb()), atol=1e-6, rtol=0)

    def test_groups_do_not_see_each_other(self):
        torch.testing.assert_close(self.gradient(Tilted(-2.0, 4))[4:], self.gradient(Tilted(-2.0, 4), slice(4, 8)))

    def test_a_torn_group_is_an_error(self):
        with pytest.raises(ValueError, match=r"6 samples are not complete groups of 4.*batch_size"):
            self.gradient(Tilted(-2.0, 4), slice(0, 6))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DivergenceRegularized("kl"), "unknown 'kl'; known: rkl, fkl, js, hellinger"),
        (lambda: DivergenceRegularized(alpha=-0.1), "alpha must be at least 0, got -0.1"),
        (lambda: DivergenceRegularized(epsilon=0.0), "epsilon must be above 0 and below 1"),
        (lambda: DivergenceRegularized(epsilon=1.0), "epsilon must be above 0 and below 1"),
        (lambda: Tilted(0.0), "tilt must be a number other than 0"),
        (lambda: Tilted(1.0, 1), "group_size must be at least 2"),
        (lambda: Tilted(score=Tilted()), "cannot be tilted again"),
        (lambda: TemperedLogProb(0.0), "tau1"),
        (lambda: TemperedLogProb(1.0, -1.0), "tau2"),
        (lambda: EntropyRegularized(math.nan), "entropy_weight"),
        (lambda: EntropyRegularized(weighting="sine"), "known: constant, linear, cosine, confidence"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
