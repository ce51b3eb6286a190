"""The Heun sampler against EluCD's step by step, against closed forms, and with what else it can be combined."""

import math

import pytest
import torch
from test_parity import RecordedNoise, SmallConv
from torch import nn

from calib_guidance.classifiers import Classifier, GaussianMixtureClassifier
from calib_guidance.denoisers import (
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    EDMDenoiser,
    GaussianMixture,
    Prediction,
)
from calib_guidance.diffusion import Interval
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, SwitchedGuidance
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDIM, DDPM, Heun
from calib_guidance.scores import TemperedLogProb
from calib_guidance.weights.edm import edm_architecture, from_edm
from tests.digits import digits_denoiser


@pytest.fixture
def edm(golden):
    fixture = golden("edm_net")
    network = UNet(**edm_architecture(fixture.weights()))
    network.load_state_dict(from_edm(fixture.weights()))
    return EDMDenoiser(network)


def spied(denoiser):
    """What the denoiser is asked and answers from now on: (σ, x in EDM's coordinates, x̂0) of each call."""
    calls, inner = [], denoiser.prepare

    def prepare(levels, y):
        predict = inner(levels, y)

        def recorded(x_t, i):
            prediction = predict(x_t, i)
            calls.append((float(levels.sigmas[i]), x_t / math.sqrt(levels.alphas_cumprod[i]), prediction.x0))
            return prediction

        return recorded

    denoiser.prepare = prepare
    return calls


def rms(x):
    return x.double().square().flatten(1).mean(1).sqrt()


def algorithm_2(classifier, scale=0.004, gamma=0.3, **kwargs):
    score = TemperedLogProb(1.0, 0.0)
    return ClassifierGuidance(
        classifier, score, scale, "x_t_normalized", schedule=GuidanceSchedule(gamma), apply_to="sample", **kwargs
    )


@pytest.mark.parametrize("name", ["edm_guided_churn0", "edm_guided_churn"])
def test_every_step_of_the_reference(golden, edm, name):
    fixture = golden(name)
    h = fixture.json["hyperparameters"]
    sampler = Heun(
        *(h[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min")),
        float(h["S_max"]),
        h["S_noise"],
    )
    guidance = algorithm_2(SmallConv(fixture.weights("classifier.")), h["max_guidance"], h["add_factor"])
    sampler.check(edm, guidance)
    churns = h["S_churn"] > 0  # where nothing is added nothing is drawn
    noise, calls, records = RecordedNoise(fixture["latents"], *(fixture["noise"] if churns else ())), spied(edm), []
    images = sampler(edm, noise, fixture["labels"].argmax(1), guidance, [records.append])

    sigma, sigma_hat = (torch.from_numpy(s[::-1].copy()) for s in (sampler.sigmas, sampler.raised))
    fixture.assert_close("t_steps", sigma, fixture["t_steps"][:-1])
    fixture.assert_close("t_hat", sigma_hat)
    assert not next(noise.tensors, None), "a noise was left over"
    assert len(calls) == sampler.nfe(edm) == 11
    x = fixture["latents"].double() * sigma[0]
    for step, record in enumerate(records):
        assert record.i == 5 - step
        following = sigma[step + 1] if record.i else 0.0
        torch.testing.assert_close(record.x_t * (1 + sigma[step] ** 2).sqrt(), x, atol=0, rtol=1e-12)
        (at, x_hat, denoised), *second = calls[2 * step : 2 * step + 2]
        assert at == pytest.approx(float(sigma_hat[step]), rel=1e-9)
        moved = x_hat - x - (sigma_hat[step] ** 2 - sigma[step] ** 2).sqrt() * fixture["noise"][step]
        fixture.assert_close("x_cur_rms", rms(x), fixture["x_cur_rms"][step], step)
        fixture.assert_close("strength", rms(moved) / rms(x), fixture["strength"][step].expand(3))
        x = record.x_next * (1 + following**2) ** 0.5
        for key, value in (
            ("x_hat", x_hat),
            ("guidance", moved),
            ("logits", record.guided.aux.logits),
            ("grads_raw", record.guided.aux.gradient),
            ("denoised", denoised),
            ("x", x),
        ):
            fixture.assert_close(key, value, fixture[key][step], step)
        torch.testing.assert_close(record.guided.prediction.x0, denoised)
        if second:
            assert second[0][0] == pytest.approx(float(following), rel=1e-9)
            fixture.assert_close("denoised_2", second[0][2], fixture["denoised_2"][step], step)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, x.float())


def streams(n, denoiser):
    return SampleStreams([0] * n, range(n), denoiser.image_shape)


def test_second_order_along_the_closed_form_of_one_gaussian():
    """x(σ) − μ grows as √(s² + σ²) along each axis; twice the steps, a quarter of the error."""
    mean, variance = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.09, 0.25, 1.0])
    denoiser = GaussianMixture([mean.tolist()], [variance.diag().tolist()])
    y, x_t = torch.zeros(16, dtype=torch.long), streams(16, denoiser)().double() * 80
    mean, variance = mean.double().view(3, 1, 1), variance.double().view(3, 1, 1)
    exact = mean + (x_t - mean) * (variance / (variance + 80**2)).sqrt()
    errors = []
    for n in (32, 64, 128):
        images = Heun(n)(denoiser, streams(16, denoiser), y)
        errors.append(float((images - exact).abs().max()))
    assert errors[2] < 2.5e-3
    assert 3.3 < errors[0] / errors[1] < 5
    assert 3.3 < errors[1] / errors[2] < 5


MIXTURE = {"means": [[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], "covariances": [0.04, 0.09, 0.02]}


def test_churn_keeps_the_distribution():
    denoiser, n = GaussianMixture([[0.5, -0.3]], [[[0.3, 0.1], [0.1, 0.2]]]), 6000
    y = torch.zeros(n, dtype=torch.long)
    ode = Heun(96)(denoiser, streams(n, denoiser), y).flatten(1)
    sde = Heun(96, s_churn=40.0)(denoiser, streams(n, denoiser), y).flatten(1)
    assert (ode - sde).abs().mean() > 0.1
    torch.testing.assert_close(sde.mean(0), torch.tensor([0.5, -0.3]), atol=0.02, rtol=0)
    torch.testing.assert_close(sde.T.cov(), torch.tensor([[0.3, 0.1], [0.1, 0.2]]), atol=0.02, rtol=0)
    between = Heun(24, s_churn=30.0, s_min=0.5, s_max=10.0)
    between = between.sigmas, between.raised
    assert ((between[1] > between[0]) == ((between[0] >= 0.5) & (between[0] <= 10))).all()
    smaller = Heun(96, s_churn=40.0, s_noise=0.9)(denoiser, streams(n, denoiser), y).flatten(1)
    assert smaller.var(0).sum() < 0.9 * sde.var(0).sum()


def test_guided_by_the_exact_classifier_it_samples_the_class():
    """ε − √(1−ᾱ)·∇log p(y|x_t) is the conditional model's ε: the samples are its, one by one."""
    free, own = GaussianMixture(**MIXTURE), GaussianMixture(**MIXTURE, class_conditional=True)
    y = torch.arange(300) % 3
    guidance = ClassifierGuidance(GaussianMixtureClassifier(free, noise_aware=True), classifier_input="x_t")
    errors = []
    for correction in (False, None):
        sampler = Heun(40, guide_correction=correction)
        expected = sampler(own, streams(300, own), y)
        found = sampler(free, streams(300, free), y, guidance)
        errors.append(float((found - expected).abs().mean()))
    assert errors[1] < 0.01  # t of the classifier is a complete step
    assert errors[1] < errors[0] / 3  # gradients at the start of each step only are of first order
    for k in range(3):
        torch.testing.assert_close(
            found[y == k].mean(0).flatten(), torch.tensor(MIXTURE["means"][k]), atol=0.08, rtol=0
        )


@pytest.mark.parametrize("steps", [18, 40])
def test_two_classes_guided_by_the_exact_classifier_have_the_exact_law(steps):
    """N(±2, 0.2²), each class where it belongs. One guided evaluation of two leaves 16 % in the other class."""
    mixture, n = GaussianMixture([[-2.0], [2.0]], [0.04, 0.04]), 2000
    guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture, noise_aware=True), classifier_input="x_t")
    y = torch.arange(n) % 2
    images = Heun(steps)(mixture, streams(n, mixture), y, guidance).flatten().double()
    assert ((images > 0) == (y == 1)).double().mean() > 0.999
    quantiles = 0.2 * torch.special.ndtri((torch.arange(n // 2, dtype=torch.float64) + 0.5) / (n // 2))
    for label, mean in enumerate((-2, 2)):
        samples = images[y == label].sort().values
        assert float(samples.std()) == pytest.approx(0.2, rel=0.1)
        # Distance (Wasserstein-1) from the class's law: 0.006 are the sampling error of 1,000 samples.
        assert float((samples - mean - quantiles).abs().mean()) < 0.02


def test_the_combined_predictions_shift_is_in_both_evaluations():
    """Algorithm 3: a step of Heun written out, with the residual's shift at x and at x'."""
    own, y = GaussianMixture(**MIXTURE, class_conditional=True), torch.arange(3)
    free = Combination(own, ClassifierFreeGuidance(2.0))
    guidance, records = ClassifierGuidance(linear(), scale=0.7, apply_to="cfg_residual"), []
    Heun(2, 1.0, 3.0)(free, streams(3, own), y, guidance, [records.append])
    classifier, predict = linear(), free.prepare(own.schedule.at_sigmas([1.0, 3.0]), y)

    def slope(x, i, sigma):
        x0, _, residual, *_ = predict(x / math.sqrt(1 + sigma**2), i)
        p = classifier(x0.float()).softmax(1)
        g = ((nn.functional.one_hot(y, 3) - p) @ classifier.weight.detach()).view_as(x0)
        return (x - x0 - 0.7 * g * (rms(residual) / rms(g)).view(3, 1, 1, 1)) / sigma

    x = streams(3, own)().double() * 3
    first = slope(x, 1, 3.0)
    expected = x - (first + slope(x - 2 * first, 0, 1.0))
    torch.testing.assert_close(records[0].x_next * math.sqrt(2), expected, atol=1e-6, rtol=1e-6)


class Replayed(Denoiser):
    """Answers what was recorded, whatever it is asked, and remembers what it was asked."""

    def __init__(self, answers, num_classes=10):
        super().__init__()
        self.schedule, self.image_shape, self.num_classes = (
            NoiseSchedule(named_betas("linear")),
            (3, 16, 16),
            num_classes,
        )
        self.answers, self.seen = answers, []

    def prepare(self, levels, y):
        def predict(x_t, i):
            self.seen.append((float(levels.sigmas[i]), x_t / math.sqrt(levels.alphas_cumprod[i])))
            return Prediction(self.answers[len(self.seen) - 1].double())

        return predict


def test_an_interval_is_decided_once_per_step(golden):
    """By the level at which a step starts: the sampler of arXiv 2404.07724 on EDM2's networks, every evaluation."""
    fixture = golden("edm2_heun_interval")
    h, sigma = fixture.json["hyperparameters"], fixture["t_steps"]
    first, last = h["guidance_interval"]
    both = [d for pair in zip(fixture["D_main"], fixture["D_main_2"], strict=False) for d in pair]
    main = Replayed([*both, fixture["D_main"][-1]])
    guide = Replayed([d for pair in zip(fixture["D_guide"], fixture["D_guide_2"], strict=True) for d in pair])
    interval = Interval(sigma_interval=[float(sigma[last]), float(sigma[first])])
    combined = Combination(main, ClassifierFreeGuidance(h["G"]), Autoguidance(guide), interval)
    records = []
    sampler = Heun(*(h[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho")))
    y = fixture["class_labels"].argmax(1)
    images = sampler(combined, RecordedNoise(fixture["latents"]), y, None, [records.append])
    guided = fixture["guided"].bool()
    assert len(main.seen) == 11
    assert len(guide.seen) == 2 * int(guided.sum()) == 6
    assert [sigma for sigma, _ in guide.seen] == [s for k in range(11) if guided[k // 2] for s in [main.seen[k][0]]]
    for step, record in enumerate(records):
        fixture.assert_close("x_hat", main.seen[2 * step][1], fixture["x_hat"][step], step)
        fixture.assert_close("denoised", record.guided.prediction.x0, fixture["denoised"][step], step)
        if step < 5:
            fixture.assert_close("x_euler", main.seen[2 * step + 1][1], fixture["x_euler"][step], step)
            scale = math.sqrt(1 + float(sigma[step + 1]) ** 2)
            fixture.assert_close("x", record.x_next * scale, fixture["x"][step], step)
    torch.testing.assert_close(images, fixture["sample"], atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("low", [0.002, 0.0001])
@pytest.mark.parametrize("steps", [2, 7, 18, 40])
def test_an_interval_written_as_the_samplers_own_range_keeps_its_ends(low, steps):
    """σ is recomputed from ᾱ: 0.002 comes back as 0.00199999999997."""
    denoiser, sampler = GaussianMixture(**MIXTURE), Heun(steps, low, 80.0)
    assert all(Interval(sigma_interval=[low, 80]).active(sampler.evaluated(denoiser)))
    inner = Interval(sigma_interval=[low * 1.001, 79.9]).active(sampler.levels(denoiser))
    assert inner == [False] + [True] * (steps - 2) + [False]


def test_switched_guidance_hands_over_between_steps_and_not_within_one():
    own, y = GaussianMixture(**MIXTURE, class_conditional=True), torch.arange(3)
    early, late, sampler = linear(), linear(), Heun(12, s_churn=5.0)
    switched = SwitchedGuidance(*(ClassifierGuidance(part, classifier_input="x_t") for part in (early, late)))
    sampler(own, streams(3, own), y, switched)
    first = int((sampler.levels(own).times > 200).sum())
    assert 2 <= first <= 10
    assert (early.calls, late.calls) == (2 * first, 2 * (12 - first) - 1)


class Linear(Classifier):
    """A linear classifier that counts its calls."""

    def __init__(self, weight, num_classes=3):
        super().__init__()
        self.num_classes, self.calls = num_classes, 0
        self.weight = nn.Parameter(weight)

    def forward(self, x, t=None):
        self.calls += 1
        return x.flatten(1) @ self.weight.T


def linear(size=2):
    return Linear(torch.randn(3, size, generator=torch.Generator().manual_seed(0)))


def test_where_each_kind_of_guidance_enters():
    """One step, from σ to 0: its end is the guided x̂0."""
    own = GaussianMixture(**MIXTURE, class_conditional=True)
    sigma, y, sampler = 3.0, torch.arange(3), Heun(1, 0.1, 3.0)
    x = streams(3, own)().double() * sigma
    level = own.schedule.at_sigmas([sigma])
    x_t, records = x / math.sqrt(1 + sigma**2), []

    def gradient(classifier, x0):
        p = classifier(x0.float()).softmax(1)
        return ((nn.functional.one_hot(y, 3) - p) @ classifier.weight.detach()).view_as(x0)

    x0 = own.prepare(level, y)(x_t, 0).x0
    found = sampler(own, streams(3, own), y, ClassifierGuidance(linear(), scale=0.7))
    expected = x0 + 0.7 * sigma**2 / math.sqrt(1 + sigma**2) * gradient(linear(), x0)
    torch.testing.assert_close(found, expected.float())

    free = Combination(own, ClassifierFreeGuidance(2.0))
    x0, _, residual, *_ = free.prepare(level, y)(x_t, 0)
    guidance = ClassifierGuidance(linear(), scale=0.7, apply_to="cfg_residual")
    found = sampler(free, streams(3, free), y, guidance, [records.append])
    g = gradient(linear(), x0)
    shift = 0.7 * g * (residual.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)).view(3, 1, 1, 1)
    torch.testing.assert_close(found, (x0 + shift).float())

    found = sampler(
        own, streams(3, own), y, ClassifierGuidance(linear(), scale=0.2, classifier_input="x_t", apply_to="sample")
    )
    g = gradient(linear(), x_t)
    strength = 0.2 * 2 / 2 * (rms(x) / rms(g)).view(3, 1, 1, 1)
    torch.testing.assert_close(
        found, own.prepare(level, y)(((x + strength * g) / math.sqrt(1 + sigma**2)), 0).x0.float()
    )


def test_shifts_of_the_sample_are_averaged_in_the_correction():
    """A step of the trapezoidal rule, written out."""
    own, y = GaussianMixture(**MIXTURE, class_conditional=True), torch.arange(3)
    guidance, records = algorithm_2(linear(), 0.3, 0.0), []
    sampler = Heun(2, 1.0, 3.0, guide_correction=True)
    sampler(own, streams(3, own), y, guidance, [records.append])
    classifier, predict = linear(), own.prepare(own.schedule.at_sigmas([1.0, 3.0]), y)

    def shift(x):
        c = (x / rms(x).clamp(min=1).view(3, 1, 1, 1)).float().requires_grad_()
        g = torch.autograd.grad(TemperedLogProb(1.0, 0.0)(classifier(c), y, 0.0).sum(), c)[0]
        return 0.3 * (rms(x) / rms(g)).view(3, 1, 1, 1) * g

    def slope(x, i, sigma):
        return (x - predict(x / math.sqrt(1 + sigma**2), i).x0) / sigma

    x = streams(3, own)().double() * 3
    first = slope(x + shift(x), 1, 3.0)
    euler = x + shift(x) - 2 * first
    expected = x + (shift(x) + shift(euler)) / 2 - (first + slope(euler, 0, 1.0))
    torch.testing.assert_close(records[0].x_next * math.sqrt(2), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("correction", [False, True, None])
@pytest.mark.parametrize("apply_to", ["score", "sample"])
def test_where_guidance_is_off_the_classifier_does_not_run(correction, apply_to):
    own, y = GaussianMixture(**MIXTURE, class_conditional=True), torch.arange(3)
    sampler = Heun(6, s_churn=2.0, guide_correction=correction)
    twice = apply_to == "score" if correction is None else correction

    def run(**schedule):
        classifier, records = linear(), []
        guidance = ClassifierGuidance(
            classifier, classifier_input="x_t", apply_to=apply_to, schedule=GuidanceSchedule(**schedule)
        )
        images = sampler(own, streams(3, own), y, guidance, [records.append])
        return images, classifier.calls, [r.i for r in records if r.guided.aux.logits is not None]

    plain = sampler(own, streams(3, own), y)
    images, calls, guided = run(sigma_interval=[1e4, 1e5])
    assert (calls, guided) == (0, [])
    assert torch.equal(images, plain)
    _, calls, guided = run(every=2)
    assert guided == [5, 3, 1]  # and the correction of those steps, not of the others
    assert calls == 3 * (1 + twice)
    images, calls, guided = run(sigma_interval=[0.5, 20.0])
    assert guided == [i for i in (5, 4, 3, 2, 1, 0) if 0.5 <= sampler.sigmas[i] <= 20.0]
    assert 2 <= len(guided) <= 4
    assert calls == len(guided) * (1 + twice)
    assert not torch.equal(images, plain)


def test_a_zero_gradient_is_unguided(edm):
    """The reference divides 0 by 0 there."""
    y = torch.arange(2)
    plain = Heun(4)(edm, streams(2, edm), y)
    guided = Heun(4)(edm, streams(2, edm), y, algorithm_2(Linear(torch.zeros(10, 192), 10)))
    assert torch.equal(guided, plain)


def test_a_sample_does_not_depend_on_its_batch(golden, edm):
    guidance = algorithm_2(SmallConv(golden("edm_guided_churn").weights("classifier.")), 0.05)
    sampler, y = Heun(6, s_churn=3.0, guide_correction=True), torch.tensor([7, 0, 3])
    together = sampler(edm, streams(3, edm), y, guidance)
    for n in range(3):
        alone = sampler(edm, SampleStreams([0], [n], edm.image_shape), y[n : n + 1], guidance)
        torch.testing.assert_close(together[n], alone[0], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_discrete_samplers_and_heun_solve_the_same_ode(edm):
    """An EDM network under DDIM, from the same noise at the same level, ends where it does under Heun."""
    y, top = torch.arange(2), edm.schedule.levels.sigmas[-1]
    heun = Heun(40, 0.01, top)(edm, streams(2, edm), y)
    coarse, fine = (
        float((DDIM(steps, clip_denoised=False)(edm, streams(2, edm), y) - heun).abs().max()) for steps in ("40", "160")
    )
    assert fine < 0.1 * heun.std()
    assert coarse / fine > 2.5  # DDIM is of first order
    ancestral = DDPM("20")(edm, streams(2, edm), y)
    assert ancestral.isfinite().all()
    assert (ancestral - heun).abs().max() > 0.1


def test_a_network_of_discrete_steps_goes_between_them(in_root):
    """The shipped digits model under 20 Heun steps and under 100 of DDIM, the same digits."""
    denoiser = digits_denoiser()
    y, levels = torch.arange(3), Heun(20).levels(denoiser)
    assert (levels.times % 1 > 0).sum() > 10
    heun = Heun(20)(denoiser, streams(3, denoiser), y)
    ddim = DDIM("100", clip_denoised=False)(denoiser, streams(3, denoiser), y)
    assert (heun - ddim).abs().mean() < 0.1 * heun.std()


def test_clipped_predictions_end_within_the_image():
    far = GaussianMixture([[3.0, -3.0]], [0.01])
    far.clip = True
    y = torch.zeros(2, dtype=torch.long)
    assert Heun(8)(far, streams(2, far), y).abs().max() > 2
    assert Heun(8, clip_denoised=True)(far, streams(2, far), y).abs().max() <= 1.001


def test_levels_count_down_with_the_progress_of_executed_steps(edm):
    levels = Heun(5).levels(edm)
    assert levels.sigmas[0] == pytest.approx(0.002, rel=1e-6)
    assert levels.sigmas[-1] == pytest.approx(80)
    assert levels.executed.tolist() == [4, 3, 2, 1, 0]
    assert levels.progress.tolist() == [0.8, 0.6, 0.4, 0.2, 0]
    assert Heun(5).nfe(Combination(edm)) == 18


def test_what_cannot_be_says_why(edm):
    for arguments, message in (
        ({"num_steps": 0}, "num_steps"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_max": math.inf}, "0 < sigma_min < sigma_max"),
        ({"rho": 0.0}, "rho"),
        ({"s_churn": -1.0}, "s_churn must be at least 0"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_min=2"),
        ({"s_noise": -1.0}, "s_noise must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Heun(**arguments)
    moving, scoring = ClassifierGuidance(linear(), apply_to="sample"), ClassifierGuidance(linear())
    Heun().check(edm, SwitchedGuidance(scoring, scoring))
    with pytest.raises(ValueError, match="both have apply_to: sample, or neither"):
        SwitchedGuidance(moving, scoring)
    with pytest.raises(ValueError, match="gamma to 0"):
        Heun().check(edm, ClassifierGuidance(linear(), schedule=GuidanceSchedule(0.3)))
    with pytest.raises(ValueError, match="scale must be at least 0, got -1"):
        ClassifierGuidance(linear(), scale=-1.0, apply_to="sample")
