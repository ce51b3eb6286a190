"""Where guidance apply_to, where it is off, and that off means that no classifier runs."""

import numpy as np
import pytest
import torch
from torch import nn

from calib_guidance.classifiers import Classifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    Prediction,
    UnconditionalModel,
)
from calib_guidance.denoisers.base import prepare_clipped
from calib_guidance.diffusion import Interval
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, SwitchedGuidance, match_norm, rms
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDIM, DDPM
from calib_guidance.scores import TemperedLogProb
from tests.inputs import seeing

Y = torch.tensor([0, 1, 2])


class Linear(Classifier):
    """A linear classifier that remembers what it was shown."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.num_classes, self.seen = 3, []
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(weight * torch.randn(3, 16, generator=generator))

    def forward(self, x, t=None):
        self.seen.append((x.detach().clone(), t))
        return x.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = UNet(4, 1, 32, 2, num_res_blocks=1, channel_mult=(1,), num_classes=3, use_scale_shift_norm=True)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return ADMDenoiser(network)


def sample(denoiser, guidance=None, sampler=None, y=Y, records=None):
    noise = SampleStreams([0] * len(y), range(len(y)), denoiser.image_shape)
    return (sampler or DDPM("8"))(denoiser, noise, y, guidance, [] if records is None else [records.append])


@pytest.mark.parametrize("sampler", [DDPM("8"), DDIM("8")], ids=["ddpm", "ddim"])
@pytest.mark.parametrize(
    "off", [{"scale": 0.0}, {"schedule": GuidanceSchedule(interval=[5000, 6000])}], ids=["scale", "interval"]
)
@pytest.mark.parametrize("at", ["x0", "x_t", "through_denoiser"])
def test_switched_off_the_classifier_never_runs_and_samples_are_those_without_guidance(denoiser, sampler, off, at):
    classifier = Linear()
    guided = sample(denoiser, ClassifierGuidance(classifier, **seeing(at), **off), sampler)
    assert not classifier.seen
    assert torch.equal(guided, sample(denoiser, None, sampler))


def test_an_interval_runs_the_classifier_inside_it_only(denoiser):
    classifier, records = Linear(), []
    guidance = ClassifierGuidance(classifier, classifier_input="x_t", schedule=GuidanceSchedule(interval=[200, 600]))
    sample(denoiser, guidance, records=records)
    assert [int(t[0]) for _, t in classifier.seen] == [571, 428, 285]
    assert [r.t for r in records if r.guided.score is not None] == [571, 428, 285]


@pytest.mark.parametrize("at", ["x0", "x_t", "through_denoiser"])
def test_the_classifier_sees_what_it_should_and_no_parameter_gets_a_gradient(denoiser, at):
    classifier, records = Linear(), []
    with torch.enable_grad():  # as in a training loop: nothing may leak into it
        images = sample(denoiser, ClassifierGuidance(classifier, **seeing(at)), records=records)
    assert not images.requires_grad
    assert classifier.weight.grad is None
    for (seen, t), record in zip(classifier.seen, records, strict=True):
        expected = record.x_t if at == "x_t" else record.guided.prediction.x0
        assert torch.equal(seen, expected)
        assert seen.abs().max() <= 1 or at == "x_t"
        assert t.tolist() == [record.t] * 3


def test_input_gradient_is_that_of_the_score(denoiser):
    classifier, records = Linear(), []
    sample(denoiser, ClassifierGuidance(classifier, scale=2.0), records=records)
    for record in records:
        p = record.guided.aux.logits.softmax(1)
        expected = (nn.functional.one_hot(Y, 3) - p) @ classifier.weight.detach()
        torch.testing.assert_close(record.guided.score.flatten(1), 2 * expected, atol=1e-5, rtol=1e-4)


def test_through_the_denoiser_is_the_chain_rule(denoiser):
    """Against central differences of S(f(x̂0(x_t))) in float64."""
    double = ADMDenoiser(
        UNet(4, 1, 32, 2, num_res_blocks=1, channel_mult=(1,), num_classes=3, use_scale_shift_norm=True)
    )
    double.network.load_state_dict(denoiser.network.state_dict())
    classifier = Linear().double()
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y, steps = Y[:2], double.schedule.at([0, 300, 700])
    predict = double.prepare(steps, y)
    guide = ClassifierGuidance(classifier.float(), backprop_through_denoiser=True).prepare(steps, y)
    found = guide(predict, x, 1).score
    score = TemperedLogProb()

    def value(x_t):
        with torch.no_grad():
            return score(classifier(predict(x_t, 1).x0).double(), y).sum()

    for place in [(0, 0, 1, 2), (1, 0, 3, 0), (1, 0, 2, 2)]:
        step = torch.zeros_like(x)
        step[place] = 3e-2  # float32 network: the best step balances rounding and curvature
        difference = (value(x + step) - value(x - step)) / (2 * 3e-2)
        assert float(found[place]) == pytest.approx(float(difference), rel=0.03, abs=0.01)


def test_switched_guidance_hands_over_at_its_step(denoiser):
    early, late = Linear(), Linear()
    guidance = SwitchedGuidance(
        ClassifierGuidance(early), ClassifierGuidance(late, classifier_input="x_t"), switch_at=428
    )
    sample(denoiser, guidance)
    assert [int(t[0]) for _, t in early.seen] == [999, 856, 714, 571]  # spaced positions round half to even
    assert [int(t[0]) for _, t in late.seen] == [428, 285, 143, 0]


def test_the_sine_factor_adds_in_the_middle_of_the_trajectory():
    schedule = GuidanceSchedule(0.3)
    assert schedule.sine(0.0) == 0
    assert schedule.sine(0.5) == pytest.approx(0.3)
    assert schedule.sine(0.9) == pytest.approx(0.3 * 0.30901699)


class TestClassifierFree:
    def test_weight_one_is_the_conditional_and_zero_the_unconditional_model(self, denoiser):
        torch.testing.assert_close(
            sample(Combination(denoiser, ClassifierFreeGuidance(1.0))), sample(denoiser), atol=2e-5, rtol=1e-4
        )
        free = ADMDenoiser(denoiser.network, class_conditional=False)
        # The variance is learned too, and stays the conditional one's, so DDIM compares the means.
        torch.testing.assert_close(
            sample(Combination(denoiser, ClassifierFreeGuidance(0.0)), sampler=DDIM("8")),
            sample(free, sampler=DDIM("8")),
            atol=2e-5,
            rtol=1e-4,
        )

    def test_epsilon_is_extrapolated(self, denoiser):
        x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        t, abar = 500, denoiser.schedule.alphas_cumprod[500]
        network, steps = denoiser.network, torch.full((3,), 500)
        with torch.no_grad():
            conditional, unconditional = (network(x, steps, y)[:, :1] for y in (Y, torch.full_like(Y, -1)))
            found = Combination(denoiser, ClassifierFreeGuidance(3.0)).prepare(denoiser.schedule.at([t]), Y)(x, 0)
        epsilon = unconditional + 3 * (conditional - unconditional)
        expected = x / abar**0.5 - (1 / abar - 1) ** 0.5 * epsilon
        torch.testing.assert_close(found.x0, expected, atol=1e-4, rtol=1e-4)
        residual = -((1 / abar - 1) ** 0.5) * 3 * (conditional - unconditional)
        torch.testing.assert_close(found.residual, residual, atol=1e-4, rtol=1e-3)

    def test_each_sample_at_a_step_of_its_own_inside_the_interval_or_outside(self, denoiser):
        """As the same samples at that step together; where it is off, the difference is 0."""
        x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        free = Combination(denoiser, ClassifierFreeGuidance(3.0), interval=Interval(interval=[200, 600]))
        with torch.no_grad():
            predict = free.prepare(denoiser.schedule.at([100, 400, 900]), Y)
            found = predict(x, torch.tensor([1, 2, 0]))
            for n, i in enumerate([1, 2, 0]):
                expected = predict(x, i)
                torch.testing.assert_close(found.x0[n], expected.x0[n], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found.variance[n], expected.variance[n])
                residual = expected.residual
                assert (residual is None) == (i != 1)
                residual = torch.zeros_like(x) if residual is None else residual
                torch.testing.assert_close(found.residual[n], residual[n], atol=1e-4, rtol=1e-4)

    def test_outside_the_interval_the_conditional_model_is_used_alone(self, denoiser):
        off = Combination(denoiser, ClassifierFreeGuidance(3.0), interval=Interval([5000, 6000]))
        assert torch.equal(sample(off), sample(denoiser))

    @pytest.mark.parametrize("sampler", [DDPM("8"), DDIM("8")], ids=["ddpm", "ddim"])
    def test_a_gradient_in_the_noise_difference_raises_the_score(self, denoiser, sampler):
        free, scores = Combination(denoiser, ClassifierFreeGuidance(2.0)), {}
        for scale in (0.0, 3.0):
            classifier = Linear()
            guidance = ClassifierGuidance(classifier, scale=scale, apply_to="cfg_residual")
            images = sample(free, guidance, sampler)
            scores[scale] = TemperedLogProb()(classifier(images), Y).mean()
        assert scores[3.0] > scores[0.0] + 0.1

    def test_the_shift_has_the_norm_of_the_noise_difference(self, denoiser):
        records = []
        guidance = ClassifierGuidance(Linear(), scale=0.5, apply_to="cfg_residual", schedule=GuidanceSchedule(0.3))
        free = Combination(denoiser, ClassifierFreeGuidance(2.0))
        sample(free, guidance, records=records)
        predict = prepare_clipped(free, DDPM("8").levels(free), Y)
        for record in records:
            with torch.no_grad():
                unshifted = predict(record.x_t, record.i)
            shift, difference = record.guided.prediction.x0 - unshifted.x0, unshifted.residual
            strength = 0.5 * (1 + GuidanceSchedule(0.3).sine(record.i / 8))
            torch.testing.assert_close(shift.flatten(1).norm(dim=1), strength * difference.flatten(1).norm(dim=1))
            torch.testing.assert_close(
                torch.cosine_similarity(shift.flatten(1), record.guided.aux.gradient.flatten(1)), torch.ones(3)
            )

    def test_a_zero_gradient_gives_no_guidance_not_nan(self, denoiser):
        free = Combination(denoiser, ClassifierFreeGuidance(2.0))
        guidance = ClassifierGuidance(Linear(weight=0.0), scale=0.5, apply_to="cfg_residual")
        assert torch.equal(sample(free, guidance), sample(free))
        gradient = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
        matched = match_norm(gradient, torch.full((2, 1, 2, 2), 3.0))
        assert torch.equal(matched, torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)]))

    @pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-25, 1e-37, 1e30])
    def test_the_direction_of_a_tiny_gradient_counts_in_full(self, size):
        """Squares of float32 underflow below 1e-23: against float64."""
        gradient, reference = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        gradient = gradient * size
        wide = gradient.double()
        expected = wide.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(rms(gradient).double() / size, expected / size)
        expected = wide / expected * reference.double().square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(match_norm(gradient, reference).double(), expected, atol=1e-6, rtol=1e-5)
        move = match_norm(wide * 1e-200, reference.double())  # Heun's, in float64
        torch.testing.assert_close(move, expected, atol=1e-12, rtol=1e-12)

    @pytest.mark.parametrize("labels", [True, False])
    def test_autoguidance_extrapolates_from_the_weaker_model(self, denoiser, labels):
        """With its own schedule and sizes, at one step and at one for each sample; outside the interval it is not run."""
        torch.manual_seed(1)
        weak = UNet(4, 1, 64, 1, num_res_blocks=1, channel_mult=(1,), num_classes=3)
        for p in weak.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
        weak = ADMDenoiser(weak, noise_schedule="cosine")
        assert not weak.has_learned_variance
        interval = Interval([200, 600])
        free = Combination(
            denoiser,
            ClassifierFreeGuidance(2.5),
            interval=interval,
            negative=(Autoguidance if labels else UnconditionalModel)(weak),
        )
        assert free.nfe == 2
        x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        at = denoiser.schedule.at([500, 900])
        with torch.no_grad():
            predict = free.prepare(at, Y)
            found = predict(x, 0)
            strong = denoiser.prepare(at, Y)(x, 0)
            negative = weak.prepare(at, Y if labels else torch.full_like(Y, -1))(x, 0).x0
            expected = negative + 2.5 * (strong.x0 - negative)
            torch.testing.assert_close(found.x0, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(found.variance, strong.variance)
            torch.testing.assert_close(found.residual, 2.5 * (strong.x0 - negative), atol=1e-4, rtol=1e-4)
            assert torch.equal(predict(x, 1).x0, denoiser.prepare(at, Y)(x, 1).x0)
            each = predict(x, torch.tensor([0, 1, 0])).x0
            torch.testing.assert_close(each[1], predict(x, 1).x0[1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(each[::2], found.x0[::2], atol=1e-4, rtol=1e-4)

    def test_negatives_that_do_not_fit_are_refused(self, denoiser):
        other = UNet(8, 1, 32, 2, num_res_blocks=1, channel_mult=(1,), num_classes=3)
        with pytest.raises(ValueError, match=r"\(1, 8, 8\), the denoiser \(1, 4, 4\)"):
            Combination(denoiser, negative=UnconditionalModel(ADMDenoiser(other)))
        free = ADMDenoiser(denoiser.network, class_conditional=False)
        with pytest.raises(ValueError, match="has None classes, the denoiser 3"):
            Combination(denoiser, negative=Autoguidance(free))
        for channels in (0, 2):
            with pytest.raises(ValueError, match="channels must be 1 … 1"):
                Combination(denoiser, channels=channels)

    def test_a_denoiser_without_classes_is_refused(self, denoiser):
        with pytest.raises(ValueError, match="class_conditional: true"):
            Combination(ADMDenoiser(denoiser.network, class_conditional=False))


@pytest.mark.parametrize("sampler", [DDPM, DDIM])
def test_recurrence_repeats_each_step(denoiser, sampler):
    records = []
    sample(denoiser, sampler=sampler("4", recurrence=3), records=records)
    assert [r.i for r in records] == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3
    assert sampler("4", recurrence=3).nfe(denoiser) == 12
    with pytest.raises(ValueError, match="recurrence must be at least 1"):
        sampler(recurrence=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_predictions_are_consistent_with_the_forward_process(prediction):
    """A network that answers exactly gives the clean image back."""
    from calib_guidance.diffusion.parameterization import diffuse, network_target, x0_coefficients

    schedule = NoiseSchedule(named_betas("cosine"))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    for t in (0, 500, 990):
        abar = torch.tensor(schedule.alphas_cumprod[t])
        x_t = diffuse(x0, noise, abar)
        output = network_target(prediction, x0, noise, abar)
        a, b = x0_coefficients(prediction, schedule.alphas_cumprod)
        torch.testing.assert_close(a[t] * x_t + b[t] * output, x0, atol=1e-8, rtol=1e-8)


class Constant(Denoiser):
    """x̂0 = 0 with no variance: what a sampler adds is then all that one sees."""

    def __init__(self):
        super().__init__()
        self.schedule, self.image_shape, self.num_classes = NoiseSchedule(named_betas("linear")), (1, 2, 2), None

    def prepare(self, levels, y):
        return lambda x_t, i: Prediction(torch.zeros_like(x_t))


class FirstPixels(Classifier):
    """Three classes by the first three pixels."""

    num_classes = 3

    def forward(self, x, t=None):
        return x.flatten(1)[:, :3]


def test_fixed_variances_are_those_of_the_schedule():
    for variance, last in (("fixed_small", "posterior"), ("fixed_large", "beta")):
        records = []
        noise = SampleStreams([0] * 2000, range(2000), (1, 2, 2))
        DDPM("5", variance)(Constant(), noise, torch.zeros(2000, dtype=torch.long), None, [records.append])
        schedule = Constant().schedule.respace("5")
        for record in records[:-1]:
            expected = schedule.posterior.variance[record.i] if last == "posterior" else schedule.betas[record.i]
            residual = record.x_next - schedule.posterior.mean_coef2[record.i] * record.x_t
            # The variance of 8,000 numbers has a relative standard error of √(2/8000).
            assert float(residual.var()) == pytest.approx(expected, rel=5 * (2 / 8000) ** 0.5)
    with pytest.raises(ValueError, match="no variance channels"):
        DDPM(variance="learned_range").check(Constant(), None)


def test_the_sines_largest_variance_is_that_of_every_step_also_where_guidance_starts_late():
    """Without noise and with x̂0 = 0 a step adds (Σ + γ·sin(π·i/N)·Σ_max)·s·∇S to a multiple of x_t."""
    model, records, y = Constant(), [], torch.zeros(3, dtype=torch.long)
    schedule = model.schedule.respace("8")
    guidance = ClassifierGuidance(FirstPixels(), scale=2.0, schedule=GuidanceSchedule(0.3, interval=[0, 500]))
    start = [torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))]
    noise = lambda: start.pop() if start else torch.zeros(3, 1, 2, 2)  # noqa: E731
    DDPM("8", "fixed_small")(model, noise, y, guidance, [records.append])
    guided = [record for record in records if record.guided.score is not None]
    assert [record.i for record in guided] == [3, 2, 1, 0]
    variance = np.exp(schedule.posterior.log_variance_clipped)
    for record in guided:
        strength = variance[record.i] + 0.3 * np.sin(np.pi * record.i / 8) * variance.max()
        added = record.x_next - float(schedule.posterior.mean_coef2[record.i]) * record.x_t
        torch.testing.assert_close(added, float(strength) * record.guided.score, atol=1e-6, rtol=1e-5)


class TestWhereAndWhatGuides:
    def test_every_kth_executed_step_from_the_first(self, denoiser):
        classifier = Linear()
        sample(denoiser, ClassifierGuidance(classifier, schedule=GuidanceSchedule(every=3)))
        executed = [999, 856, 714, 571, 428, 285, 143, 0]
        assert [int(t[0]) for _, t in classifier.seen] == executed[::3]

    def test_an_interval_of_sigma_is_that_of_its_steps(self, denoiser):
        levels = DDPM("8").levels(denoiser)
        low, high = levels.sigmas[2], levels.sigmas[5]
        schedule = GuidanceSchedule(sigma_interval=[low, high])
        assert schedule.active(levels) == [2 <= i <= 5 for i in range(8)]
        both = GuidanceSchedule(sigma_interval=[low, high], interval=[levels.times[4], 999])
        assert both.active(levels) == [4 <= i <= 5 for i in range(8)]

    @pytest.mark.parametrize("bad", [{"every": 0}, {"sigma_interval": [2.0, 1.0]}, {"interval": [1.0]}])
    def test_schedules_that_cannot_be(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GuidanceSchedule(**bad)

    def test_normalized_has_a_root_mean_square_of_one_at_most(self, denoiser):
        classifier, levels = Linear(), DDPM("8").levels(denoiser)
        x_t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x_t[1] *= 1e-3
        guide = ClassifierGuidance(classifier, classifier_input="x_t_normalized").prepare(levels, Y)
        found = guide(lambda x, i: Prediction(x), x_t, 4)
        ((shown, t),) = classifier.seen
        ve = x_t / levels.alphas_cumprod[4] ** 0.5
        torch.testing.assert_close(shown[0], (ve[0] / ve[0].square().mean().sqrt()).float())
        torch.testing.assert_close(shown[1], ve[1].float())
        assert t.tolist() == [571] * 3
        # The gradient is taken there, not carried back through the normalization.
        expected = (nn.functional.one_hot(Y, 3) - found.aux.logits.softmax(1)) @ classifier.weight.detach()
        torch.testing.assert_close(found.score.flatten(1).float(), expected)

    def test_the_sample_is_moved_along_the_score_or_not_at_all(self, denoiser):
        class Flat(Linear):
            def forward(self, x, t=None):
                return super().forward(x, t) * torch.tensor([1.0, 0.0, 1.0])[:, None]

        levels, x_t = DDPM("8").levels(denoiser), torch.randn(3, 1, 4, 4)
        guidance = ClassifierGuidance(
            Flat(), TemperedLogProb(1.0, 0.0), 0.004, "x_t", schedule=GuidanceSchedule(0.3), apply_to="sample"
        )
        found = guidance.prepare(levels, Y)(None, x_t, 4)
        assert found.prediction is None
        torch.testing.assert_close(found.score, 0.004 * found.aux.gradient)
        assert (found.score.flatten(1).norm(dim=1) > 0).tolist() == [True, False, True]
        plan = guidance.plan(levels)
        assert plan.moves_sample
        assert (plan.scale[4], plan.sine[4]) == (0.004, pytest.approx(0.3))

    @pytest.mark.parametrize("sampler", [DDPM("8"), DDIM("8")], ids=["ddpm", "ddim"])
    def test_moving_the_sample_is_refused_where_it_is_not_defined(self, denoiser, sampler):
        with pytest.raises(ValueError, match="Algorithm 2.*Heun"):
            sampler.check(denoiser, ClassifierGuidance(Linear(), apply_to="sample"))

    def test_a_decoder_of_its_own_stands_in_for_the_denoisers(self, denoiser):
        class Halve(nn.Module):
            def forward(self, x0):
                return x0 / 2

        plain, records = Linear(), []
        sample(denoiser, ClassifierGuidance(plain, scale=1e-6), records=records)
        halved = Linear()
        sample(denoiser, ClassifierGuidance(halved, scale=1e-6, decoder=Halve()))
        for (full, _), (half, _) in zip(plain.seen, halved.seen, strict=True):
            torch.testing.assert_close(half, full / 2, atol=1e-4, rtol=1e-4)
