"""The Gaussian mixture, whose every quantity is known, and what samplers and guidance do to it."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from calib_guidance.classifiers.gaussian_mixture import GaussianMixtureClassifier
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, SwitchedGuidance
from calib_guidance.samplers import DDIM, DDPM
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, TemperedLogProb, Tilted
from tests.inputs import seeing

# Full, unequal covariances and unequal weights; the classes overlap (Bayes error 0.075), so that guidance matters.
MEANS = [[-1.2, 0.4], [0.6, 1.1], [0.9, -0.8]]
COVARIANCES = [[[0.5, 0.2], [0.2, 0.3]], [[0.25, -0.12], [-0.12, 0.4]], [[0.6, -0.25], [-0.25, 0.35]]]
WEIGHTS = [0.5, 0.2, 0.3]
IDENTITY = [[[1.0, 0.0], [0.0, 1.0]]] * 3
Y = 1
N = 3000


class Gaussians:
    """Standard normal images from one generator, for thousands of samples at once."""

    def __init__(self, n=N, seed=1):
        self.n, self.generator = n, torch.Generator().manual_seed(seed)

    def __call__(self):
        return torch.randn(self.n, 2, 1, 1, generator=self.generator)


class Counting(GaussianMixtureClassifier):
    """Remembers the steps at which it was called."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def forward(self, x, t=None):
        self.steps.append(int(t[0]))
        return super().forward(x, t)


@pytest.fixture(scope="module")
def mixture():
    return GaussianMixture(MEANS, COVARIANCES, WEIGHTS)


@pytest.fixture(scope="module")
def conditional():
    return GaussianMixture(MEANS, COVARIANCES, WEIGHTS, class_conditional=True)


def points(n=6, seed=0):
    return torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(sampler, mixture, guidance=None, n=N, seed=1, observers=()):
    """``(n, 2, 1, 1)`` samples of class Y."""
    return sampler(mixture, Gaussians(n, seed), torch.full((n,), Y), guidance, observers)


def exact_guidance(mixture, **settings):
    return ClassifierGuidance(GaussianMixtureClassifier(mixture, noise_aware=True), classifier_input="x_t", **settings)


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def central_differences(function, x, step=1e-6):
    """∇ of the sum of ``function``; its error is of the order of step² and 1e-16/step."""
    result = torch.zeros_like(x)
    for place in itertools.product(*map(range, x.shape)):
        shift = torch.zeros_like(x)
        shift[place] = step
        result[place] = (function(x + shift).sum() - function(x - shift).sum()) / (2 * step)
    return result


def check_normal(x, mean, covariance):
    """Mean and covariance within five standard errors: √(s_ii/n) and √((s_ij² + s_ii·s_jj)/n)."""
    x, variances = x.flatten(1).double(), covariance.diagonal()
    assert ((x.mean(0) - torch.tensor(mean)).abs() < 5 * (variances / len(x)).sqrt()).all()
    standard = ((covariance.square() + variances.outer(variances)) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 5 * standard).all()


class TestClosedForms:
    """Against torch.distributions, linear solves, autograd and finite differences, which use none of its code."""

    @staticmethod
    def reference(abar):
        """Components and weights of p_t."""
        means, covariances = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, COVARIANCES))
        noisy = abar * covariances + (1 - abar) * torch.eye(2, dtype=torch.float64)
        return MultivariateNormal(math.sqrt(abar) * means, noisy), torch.tensor(WEIGHTS, dtype=torch.float64)

    @pytest.mark.parametrize("t", [None, 0, 150, 500, 999])
    def test_densities(self, mixture, t):
        x = points()
        components, weights = self.reference(1.0 if t is None else float(mixture.schedule.alphas_cumprod[t]))
        joint = components.log_prob(x.flatten(1)[:, None]) + weights.log()
        torch.testing.assert_close(mixture.log_joint(x, t), joint)
        density = MixtureSameFamily(Categorical(weights), components).log_prob(x.flatten(1))
        torch.testing.assert_close(mixture.log_prob(x, t), density)

    @pytest.mark.parametrize("t", [0, 150, 500, 999])
    def test_posterior_mean_is_tweedies(self, mixture, t):
        """E[x0 | x_t] = (x_t + (1−ᾱ)·∇log p_t(x_t))/√ᾱ; given the class, with the gradient of its own log-density."""
        x, abar = points(), float(mixture.schedule.alphas_cumprod[t])

        def tweedie(log_prob):
            return (x + (1 - abar) * gradient(log_prob, x)) / math.sqrt(abar)

        # At t = 999 the difference of two nearly equal terms is divided by √ᾱ = 0.006: 1e-16 becomes about 1e-13.
        tolerance = {"atol": 1e-11, "rtol": 1e-11}
        found = mixture.posterior_mean(x, abar)
        torch.testing.assert_close(found, tweedie(lambda v: mixture.log_prob(v, t)), **tolerance)
        components, weights = self.reference(abar)
        density = MixtureSameFamily(Categorical(weights), components)
        torch.testing.assert_close(found, tweedie(lambda v: density.log_prob(v.flatten(1))), **tolerance)
        y = torch.tensor([0, 1, 2, -1, 1, -1])
        found = mixture.posterior_mean(x, abar, y)
        own = tweedie(lambda v: components.log_prob(v.flatten(1)[:, None])[range(6), y.clamp(min=0)])
        expected = torch.where((y >= 0).view(-1, 1, 1, 1), own, mixture.posterior_mean(x, abar))
        torch.testing.assert_close(found, expected, **tolerance)

    @pytest.mark.parametrize("t", [0, 150, 500, 999])
    def test_posterior_mean_is_that_of_jointly_normal_variables(self, mixture, t):
        x, abar = points(), float(mixture.schedule.alphas_cumprod[t])
        components, weights = self.reference(abar)
        means, covariances = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, COVARIANCES))
        deviation = x.flatten(1)[:, None] - components.mean
        solved = torch.linalg.solve(components.covariance_matrix, deviation[..., None])
        each = means + math.sqrt(abar) * (covariances @ solved).squeeze(-1)
        share = (components.log_prob(x.flatten(1)[:, None]) + weights.log()).softmax(1)
        expected = (share[..., None] * each).sum(1)
        torch.testing.assert_close(mixture.posterior_mean(x, abar).flatten(1), expected)

    def test_the_denoiser_is_the_posterior_mean(self, mixture, conditional):
        """Labels reach the class-conditional model alone, which falls back to the unconditional one for −1 and for None."""
        x, y, timesteps = points(), torch.tensor([0, 1, 2, -1, 1, -1]), [20, 700]
        for i, t in enumerate(timesteps):
            abar = float(mixture.schedule.alphas_cumprod[t])
            plain = mixture.posterior_mean(x, abar)
            for model, labels, expected in (
                (mixture, y, plain),
                (conditional, None, plain),
                (conditional, y, mixture.posterior_mean(x, abar, y)),
            ):
                prediction = model.prepare(mixture.schedule.at(timesteps), labels)(x, i)
                assert torch.equal(prediction.x0, expected)
                assert prediction.variance is None
        assert (mixture.num_classes, conditional.num_classes, mixture.image_shape) == (None, 3, (2, 1, 1))
        assert not torch.allclose(mixture.posterior_mean(x, 0.5), mixture.posterior_mean(x, 0.5, y))

    def test_each_sample_at_a_step_of_its_own(self, conditional):
        x, y, timesteps = points(), torch.tensor([0, 1, 2, -1, 1, -1]), [20, 300, 700]
        i = torch.tensor([2, 0, 1, 1, 2, 0])
        t = torch.tensor(timesteps)[i]
        predict = conditional.prepare(conditional.schedule.at(timesteps), y)
        together, joint = predict(x, i).x0, conditional.log_joint(x, t)
        logits = GaussianMixtureClassifier(conditional, noise_aware=True)(x, t)
        for n in range(len(x)):
            torch.testing.assert_close(together[n], predict(x, int(i[n])).x0[n])
            for found in (joint, logits):
                torch.testing.assert_close(found[n], conditional.log_joint(x, int(t[n]))[n])

    @pytest.mark.parametrize("t", [0, 150, 500, 999])
    def test_the_classifier_is_bayes_rule(self, mixture, t):
        x = points()
        for classifier, abar in (
            (GaussianMixtureClassifier(mixture, noise_aware=True), float(mixture.schedule.alphas_cumprod[t])),
            (GaussianMixtureClassifier(mixture), 1.0),
        ):
            components, weights = self.reference(abar)
            likelihood = components.log_prob(x.flatten(1)[:, None]).exp() * weights
            bayes = likelihood / likelihood.sum(1, keepdim=True)
            torch.testing.assert_close(classifier(x, torch.full((6,), t)).softmax(1), bayes)
        assert classifier.num_classes == 3

    def test_numbers_for_covariances_are_spheres(self):
        round_one, full = GaussianMixture(MEANS, [0.5, 1.0, 2.0]), np.array([0.5, 1.0, 2.0])[:, None, None] * np.eye(2)
        torch.testing.assert_close(
            round_one.log_joint(points()), GaussianMixture(MEANS, full.tolist()).log_joint(points())
        )
        torch.testing.assert_close(round_one.log_weights, torch.full((3,), -math.log(3), dtype=torch.float64))

    def test_weights_are_shares(self, mixture):
        doubled = GaussianMixture(MEANS, COVARIANCES, [2 * w for w in WEIGHTS])
        torch.testing.assert_close(doubled.log_joint(points()), mixture.log_joint(points()))

    def test_three_dimensions(self):
        """Density, Tweedie's formula and exact samples; axes of two dimensions may be their own transpose, these are not."""
        means, a = [[0.0, 1.0, -1.0], [1.0, 0.0, 2.0]], np.random.default_rng(0).normal(size=(2, 3, 3))
        covariances = torch.tensor(a @ a.transpose(0, 2, 1) + 0.1 * np.eye(3))
        model = GaussianMixture(means, covariances.tolist(), [1.0, 3.0])
        x = torch.randn(5, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        components = MultivariateNormal(torch.tensor(means, dtype=torch.float64), covariances)
        expected = components.log_prob(x.flatten(1)[:, None]) + torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        torch.testing.assert_close(model.log_joint(x), expected)
        abar = float(model.schedule.alphas_cumprod[300])
        tweedie = (x + (1 - abar) * gradient(lambda v: model.log_prob(v, 300), x)) / math.sqrt(abar)
        torch.testing.assert_close(model.posterior_mean(x, abar), tweedie, atol=1e-11, rtol=1e-11)
        for y in range(2):
            check_normal(model.sample(20000, y, torch.Generator().manual_seed(y)), means[y], covariances[y])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((MEANS, COVARIANCES[:2]), "3 means of 2 numbers need 3 covariances"),
            ((MEANS, [[[1.0]]] * 3), "3 means of 2 numbers need 3 covariances"),
            ((MEANS, COVARIANCES, [1.0, 1.0]), "3 means of 2 numbers need 3 covariances and weights"),
            ((MEANS, [*COVARIANCES[:2], [[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
            ((MEANS, [*COVARIANCES[:2], [[1.0, 5.0], [0.0, 1.0]]]), "symmetric"),
            ((MEANS, [1.0, 1.0, 0.0]), "positive definite"),
            ((MEANS, COVARIANCES, [1.0, 0.0, 1.0]), "weights positive"),
        ],
    )
    def test_an_invalid_mixture_is_an_error(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(*arguments)


def test_a_cast_of_the_module_keeps_it_exact():
    model, cast = GaussianMixture(MEANS, COVARIANCES), GaussianMixture(MEANS, COVARIANCES).half()
    x = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cast.log_joint(x, 300), model.log_joint(x, 300))


class TestProposition:
    """Proposition 4.2 of arXiv 2310.11311, on the density and as guidance sees it."""

    def test_joint_and_conditional_gradients_of_unit_spheres(self):
        model, x = GaussianMixture(MEANS, IDENTITY, WEIGHTS), points()
        means = torch.tensor(MEANS, dtype=torch.float64)
        posterior = MultivariateNormal(means, torch.eye(2, dtype=torch.float64)).log_prob(x.flatten(1)[:, None])
        posterior = (posterior + torch.tensor(WEIGHTS, dtype=torch.float64).log()).softmax(1)
        for y in range(3):
            joint = gradient(lambda v, y=y: model.log_joint(v)[:, y], x)
            torch.testing.assert_close(joint.flatten(1), means[y] - x.flatten(1))
            conditional = gradient(lambda v, y=y: model.log_joint(v).log_softmax(1)[:, y], x)
            torch.testing.assert_close(conditional.flatten(1), means[y] - posterior @ means)

    def test_joint_gradient_of_any_covariance(self, mixture):
        """Σ_y⁻¹(μ_y − x)."""
        x = points()
        for y, (mean, covariance) in enumerate(zip(MEANS, COVARIANCES, strict=True)):
            joint = gradient(lambda v, y=y: mixture.log_joint(v)[:, y], x).flatten(1)
            expected = (torch.tensor(mean) - x.flatten(1)) @ torch.linalg.inv(torch.tensor(covariance).double())
            # The constants above go through float32 once, whose unit in the last place is 6e-8.
            torch.testing.assert_close(joint, expected, atol=1e-6, rtol=1e-6)

    def test_marginal_temperature_zero_is_the_joint_direction_in_sampling(self):
        model = GaussianMixture(MEANS, IDENTITY, WEIGHTS)
        means = torch.tensor(MEANS)
        for tau2 in (0.0, 1.0):
            guidance = ClassifierGuidance(GaussianMixtureClassifier(model), TemperedLogProb(1.0, tau2), scale=2.0)
            records = []
            draw(DDPM("20"), model, guidance, n=8, observers=[records.append])
            for record in records:
                x0 = record.guided.prediction.x0
                other = x0.flatten(1) if tau2 == 0 else model.log_joint(x0).softmax(1).float() @ means
                direction = (means[Y] - other)[:, :, None, None]
                torch.testing.assert_close(record.guided.aux.gradient, direction, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(record.guided.score, 2 * direction, atol=1e-5, rtol=1e-5)


def std_after(sampler, schedule, sigma2, guided=0.0):
    """Variance of samples of N(0, σ²), by the recursion of a scalar linear map; ``guided``: s of the joint energy at x_t."""
    tables, variance = schedule.respace(sampler.steps), 1.0
    for i in reversed(range(len(tables))):
        abar, previous = tables.alphas_cumprod[i], tables.alphas_cumprod[i - 1] if i else 1.0
        gain, score = math.sqrt(abar) * sigma2 / (abar * sigma2 + 1 - abar), -1 / (abar * sigma2 + 1 - abar)
        if isinstance(sampler, DDIM):
            epsilon = (1 - math.sqrt(abar) * gain) / math.sqrt(1 - abar) - math.sqrt(1 - abar) * guided * score
            x0 = (1 - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
            variance *= (math.sqrt(previous) * x0 + math.sqrt(1 - previous) * epsilon) ** 2
        else:
            added = tables.posterior.variance[max(i, 1)]
            slope = tables.posterior.mean_coef1[i] * gain + tables.posterior.mean_coef2[i] + added * guided * score
            variance = variance * slope**2 + (added if i else 0)
    return variance


class TestOneGaussian:
    """Every step is linear, so that the result is known in closed form at any number of steps."""

    sigma2 = 0.3
    model = GaussianMixture([[0.0, 0.0]], [0.3])

    def guidance(self, scale):
        # With one class the joint energy is log p_t(x_t) itself.
        return exact_guidance(self.model, score=TemperedLogProb(1.0, 0.0), scale=scale)

    @pytest.mark.parametrize("scale", [0.0, 0.1, 0.3])
    def test_ddim_is_a_known_factor(self, scale):
        sampler, x_T = DDIM("40"), Gaussians(50)()
        x = sampler(self.model, Gaussians(50), torch.zeros(50, dtype=torch.long), self.guidance(scale))
        factor = math.sqrt(std_after(sampler, self.model.schedule, self.sigma2, scale))
        torch.testing.assert_close(x, factor * x_T, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
    def test_ddpm_has_a_known_variance(self, scale):
        sampler, n = DDPM("40", "fixed_small"), 20000
        x = sampler(self.model, Gaussians(n), torch.zeros(n, dtype=torch.long), self.guidance(scale)).double()
        expected = std_after(sampler, self.model.schedule, self.sigma2, scale)
        # The relative standard error of a normal variance from 2n numbers is √(2/2n).
        assert abs(x.square().mean() / expected - 1) < 5 / math.sqrt(n)


@functools.cache
def distance_within(a):
    return float(torch.cdist(a.flatten(1), a.flatten(1)).sum(dtype=torch.float64)) / (len(a) * (len(a) - 1))


def energy_distance(a, b):
    """2E|a−b| − E|a−a'| − E|b−b'| of samples ``(n, 2, 1, 1)``, unbiased: 0 on average where both have one distribution."""
    between = float(torch.cdist(a.flatten(1), b.flatten(1)).mean(dtype=torch.float64))
    return 2 * between - distance_within(a) - distance_within(b)


@pytest.fixture(scope="module")
def floor():
    """What the energy distance of two exact sets of N samples stays below: mean and five standard deviations of 15 pairs."""
    model = GaussianMixture(MEANS, COVARIANCES, WEIGHTS)
    sets = [model.sample(N, Y, torch.Generator().manual_seed(100 + k)) for k in range(6)]
    distances = [energy_distance(a, b) for a, b in itertools.combinations(sets, 2)]
    assert abs(np.mean(distances)) < np.std(distances)
    return np.mean(distances) + 5 * np.std(distances)


@pytest.fixture(scope="module")
def exact(mixture):
    return mixture.sample(N, Y, torch.Generator().manual_seed(99))


class TestUnguided:
    """Samples of the model as it is."""

    means, covariances = torch.tensor(MEANS).double(), torch.tensor(COVARIANCES).double()
    weights = torch.tensor(WEIGHTS).double()
    mean = weights @ means
    covariance = torch.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None]) - mean.outer(mean)

    def check_moments(self, x, mixture, allowance):
        """Mean, covariance and class shares within five standard errors and an allowance for the covariance."""
        deviation = x.flatten(1).double() - self.mean
        products = deviation[:, [0, 0, 1]] * deviation[:, [0, 1, 1]]
        shares = mixture.log_joint(x).softmax(1)
        for values, expected, allowed in (
            (deviation, 0.0, 0.0),
            (products, self.covariance[[0, 0, 1], [0, 1, 1]], allowance),
            (shares, self.weights, 0.0),
        ):
            error = (values.mean(0) - expected).abs()
            assert (error < 5 * values.std(0) / math.sqrt(len(x)) + allowed).all()

    def test_exact_samples(self, mixture):
        self.check_moments(mixture.sample(50000, generator=torch.Generator().manual_seed(0)), mixture, 0.0)
        for y in range(3):
            check_normal(mixture.sample(50000, y, torch.Generator().manual_seed(y)), MEANS[y], self.covariances[y])

    @pytest.mark.parametrize(
        "sampler",
        [
            DDPM("250", "fixed_small"),
            DDPM("250", "fixed_large"),
            DDIM("100"),
            DDPM("100", "fixed_small", recurrence=2),
            DDIM("100", recurrence=2),
        ],
        ids=["ddpm_small", "ddpm_large", "ddim", "ddpm_recurrence", "ddim_recurrence"],
    )
    def test_moments_and_shares(self, mixture, sampler):
        """The allowance is what discretization takes off the variance of a single Gaussian that is as wide as the mixture."""
        wide = float(torch.linalg.eigvalsh(self.covariance).max())
        self.check_moments(
            draw(sampler, mixture, n=10000),
            mixture,
            abs(std_after(sampler, mixture.schedule, wide) - wide),
        )

    @pytest.mark.parametrize(
        "sampler", [DDPM("250"), DDIM("250"), DDPM("200", recurrence=2), DDIM("200", recurrence=2)]
    )
    def test_the_class_conditional_model_reaches_the_floor(self, conditional, sampler, exact, floor):
        """Recurrence too leaves the distribution alone, though it does not leave the samples alone."""
        assert energy_distance(draw(sampler, conditional), exact) < floor

    @pytest.mark.parametrize(
        "sampler", [DDPM("10", "fixed_small"), DDPM("10", "fixed_large"), DDIM("10"), DDIM("10", eta=1.0)]
    )
    def test_the_last_step_adds_no_noise(self, mixture, sampler):
        """Its variance is too small to show in the moments."""
        records = []
        draw(sampler, mixture, n=4, observers=[records.append])
        torch.testing.assert_close(records[-1].x_next, records[-1].guided.prediction.x0, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sampler", [DDPM, DDIM])
    def test_recurrence_does_every_step_again(self, mixture, sampler):
        records = []
        again = draw(sampler("10", recurrence=3), mixture, n=4, observers=[records.append])
        assert [r.i for r in records] == [i for i in reversed(range(10)) for _ in range(3)]
        assert sampler("10", recurrence=3).nfe(mixture) == 30
        assert not torch.allclose(again, draw(sampler("10"), mixture, n=4))


class TestExactGuidance:
    """p_t(x_t)·p_t(y | x_t) is the class's own density at every noise level, so that guidance at scale 1 must sample it."""

    @pytest.mark.parametrize(
        ("kind", "steps"),
        [
            (lambda n: DDIM(n), (10, 50, 250)),
            (lambda n: DDPM(n, "fixed_large"), (10, 50, 250)),
            # Σ of the posterior is shorter than the exact step, β/√α, most of all where ᾱ is near 1: slower to converge.
            (lambda n: DDPM(n, "fixed_small"), (10, 50, 250, 1000)),
        ],
        ids=["ddim", "ddpm_large", "ddpm_small"],
    )
    def test_reaches_the_class_as_steps_grow(self, mixture, exact, floor, kind, steps):
        """Measured at 10 steps: 0.018, 0.033, 0.39. Floor: 0.0016. Measured at the last: below 0.0006 for any of three seeds."""
        found = [energy_distance(draw(kind(str(n)), mixture, exact_guidance(mixture)), exact) for n in steps]
        assert found[0] > 5 * floor
        assert found[-1] < floor
        for coarse, fine in itertools.pairwise(found):
            assert fine < max(0.8 * coarse, 2 * floor)
        # Without guidance the samples are those of all three classes.
        assert energy_distance(draw(kind("50"), mixture), exact) > 100 * floor

    def test_ddim_is_the_class_conditional_model_path_by_path(self, mixture, conditional):
        """E[x0 | x_t, y] − E[x0 | x_t] = (1−ᾱ)/√ᾱ·∇log p_t(y | x_t) is just what DDIM adds."""
        for steps in ("10", "ddim50"):
            guided, own = draw(DDIM(steps), mixture, exact_guidance(mixture)), draw(DDIM(steps), conditional)
            # Measured: 1e-6 at 10 steps, 3e-6 at 50.
            torch.testing.assert_close(guided, own, atol=3e-5, rtol=0)

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_ddpm_nears_the_class_conditional_model(self, mixture, conditional, variance):
        """Its Σ is β/√α to first order only. The largest gap of a path goes down with the number of steps, about as 1/N."""
        gaps = [
            float((draw(s, mixture, exact_guidance(mixture)) - draw(s, conditional)).abs().max())
            for s in (DDPM("25", variance), DDPM("250", variance))
        ]
        # Measured: 1.0 and 0.15; 0.15 and 0.015.
        assert gaps[1] < gaps[0] / 5

    @pytest.mark.parametrize(("at", "noise_aware"), [("x_t", True), ("x0", False), ("through_denoiser", False)])
    def test_a_low_marginal_temperature_pulls_to_the_mode(self, mixture, at, noise_aware):
        """Mean distance to μ_y at τ2 = 1, 0.5, 0: 0.71, 0.61, 0.55; 0.73, 0.55, 0.44; 0.65, 0.55, 0.46. Variance goes along."""
        distances, variances = [], []
        for tau2 in (1.0, 0.5, 0.0):
            score = TemperedLogProb(1.0, tau2)
            guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture, noise_aware), score, **seeing(at))
            x = draw(DDPM("100"), mixture, guidance, n=2000).flatten(1).double()
            distances.append((x - torch.tensor(MEANS[Y])).norm(dim=1))
            variances.append(float(x.var(0).sum()))
        for plain, soft in itertools.pairwise(distances):
            # The same noise drives both, so that the differences are paired.
            gain = plain - soft
            assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))
        # The relative standard error of each is about 1/√2000 = 0.02.
        assert variances[1] < 0.9 * variances[0]
        assert variances[2] < 0.9 * variances[1]


class TestWhatTheClassifierSees:
    scores = (
        TemperedLogProb(),
        TemperedLogProb(1.0, 0.0),
        EntropyRegularized(0.7, "linear"),
        DivergenceRegularized("fkl", 0.8),
        DivergenceRegularized("js", 0.8),
        Tilted(-2.0, 3),
    )

    @pytest.mark.parametrize("score", scores, ids=lambda s: type(s).__name__)
    @pytest.mark.parametrize("at", ["x0", "x_t", "through_denoiser"])
    def test_gradients_are_those_of_finite_differences(self, mixture, score, at):
        """At x̂0 the denoiser is not differentiated; through it, S(f(x̂0(x_t))) is differentiated in x_t; all in float64."""
        y, timesteps, scale = torch.tensor([0, 1, 2, 2, 1, 0]), [30, 400, 800], 1.7
        classifier = GaussianMixtureClassifier(mixture, noise_aware=at == "x_t")
        guide = ClassifierGuidance(classifier, score, scale=scale, **seeing(at)).prepare(
            mixture.schedule.at(timesteps), y
        )
        predict = mixture.prepare(mixture.schedule.at(timesteps), y)
        for i, t in enumerate(timesteps):
            x_t, time = points(), t / 999
            x0 = predict(x_t, i).x0
            shown = x0 if at == "x0" else x_t

            def value(v, i=i, t=t, time=time):
                seen = predict(v, i).x0 if at == "through_denoiser" else v
                return score(classifier(seen, torch.full((6,), t)), y, time)

            guided = guide(predict, x_t, i)
            expected = central_differences(value, shown)
            # Rounding: values of the order of 100 at most times 1e-16/1e-6.
            torch.testing.assert_close(guided.aux.gradient, expected, atol=1e-7, rtol=1e-7)
            torch.testing.assert_close(guided.score, scale * expected, atol=2e-7, rtol=1e-7)
            assert torch.equal(guided.prediction.x0, x0)
            assert not guided.prediction.x0.requires_grad
            assert expected.abs().max() > 1e-4  # as large as the tolerance would prove nothing

    def test_through_the_denoiser_is_the_jacobian_times_the_gradient(self, mixture):
        """∂x̂0/∂x_t = √ᾱ/(1−ᾱ)·Cov[x0 | x_t], which the gradient at x̂0 leaves out."""
        x_t, y, timesteps = points(), torch.full((6,), Y), [200]
        abar = float(mixture.schedule.alphas_cumprod[200])
        predict = mixture.prepare(mixture.schedule.at(timesteps), y)
        plain, through = (
            ClassifierGuidance(GaussianMixtureClassifier(mixture), **seeing(at)).prepare(
                mixture.schedule.at(timesteps), y
            )(predict, x_t, 0)
            for at in ("x0", "through_denoiser")
        )
        jacobian = torch.autograd.functional.jacobian(lambda v: mixture.posterior_mean(v, abar).flatten(1).sum(0), x_t)
        jacobian = jacobian.flatten(2).transpose(0, 1)  # (N, of x̂0, of x_t)
        expected = torch.einsum("noi,no->ni", jacobian, plain.score.flatten(1))
        torch.testing.assert_close(through.score.flatten(1), expected)
        # A covariance, up to a factor: symmetric, positive.
        torch.testing.assert_close(jacobian, jacobian.mT)
        assert (torch.linalg.eigvalsh(jacobian) > 0).all()

    @pytest.mark.parametrize("sampler", [DDPM("10"), DDIM("10")])
    def test_time_is_a_fraction_of_the_full_process(self, mixture, sampler):
        """However few its steps are: from 1 at pure noise to 0 at the image."""

        class Timed(TemperedLogProb):
            times = ()

            def forward(self, logits, y, time=1.0):
                self.times += (time,)
                return super().forward(logits, y, time)

        score = Timed()
        draw(sampler, mixture, ClassifierGuidance(GaussianMixtureClassifier(mixture), score), n=4)
        assert score.times == tuple(i * 111 / 999 for i in reversed(range(10)))


class TestOff:
    @pytest.mark.parametrize("sampler", [DDPM("20"), DDPM("20", recurrence=2), DDIM("20"), DDIM("20", eta=1.0)])
    @pytest.mark.parametrize(
        "settings",
        [{"scale": 0.0}, {"schedule": GuidanceSchedule(interval=[1000, 2000])}],
        ids=["scale_0", "interval_outside"],
    )
    @pytest.mark.parametrize("at", ["x0", "x_t", "through_denoiser"])
    def test_off_is_unguided_byte_by_byte(self, mixture, sampler, settings, at):
        classifier = Counting(mixture, noise_aware=True)
        off = draw(sampler, mixture, ClassifierGuidance(classifier, **seeing(at), **settings), n=16)
        assert off.numpy().tobytes() == draw(sampler, mixture, n=16).numpy().tobytes()
        assert classifier.steps == []
        on = draw(sampler, mixture, ClassifierGuidance(classifier, **seeing(at)), n=16)
        assert len(classifier.steps) == sampler.nfe(mixture)
        assert not torch.equal(on, off)

    def test_an_interval_runs_the_classifier_inside_it_alone(self, mixture):
        classifier = Counting(mixture, noise_aware=True)
        schedule = GuidanceSchedule(interval=[200, 480])
        records = []
        sampler = DDIM("ddim25")  # t = 0, 40 … 960
        draw(
            sampler,
            mixture,
            ClassifierGuidance(classifier, classifier_input="x_t", schedule=schedule),
            8,
            observers=[records.append],
        )
        assert classifier.steps == [480, 440, 400, 360, 320, 280, 240, 200]
        plain = []
        draw(sampler, mixture, None, 8, observers=[plain.append])
        for guided, unguided in zip(records, plain, strict=True):
            assert (guided.guided.score is None) == (not 200 <= guided.t <= 480)
            # Up to the first guided step nothing differs; from there on everything does.
            assert torch.equal(guided.x_next, unguided.x_next) == (guided.t > 480)


class TestSwitched:
    def test_the_step_picks_the_guidance(self, mixture):
        """Down to t > 200 the clean classifier at x̂0, from 200 itself the noise-aware one at x_t, each with its own score."""
        clean, aware = Counting(mixture), Counting(mixture, noise_aware=True)
        soft = TemperedLogProb(1.0, 0.5)
        guidance = SwitchedGuidance(
            ClassifierGuidance(clean, soft, scale=2.0),
            ClassifierGuidance(aware, scale=3.0, classifier_input="x_t"),
            switch_at=200,
        )
        records = []
        draw(DDPM("ddim25"), mixture, guidance, 8, observers=[records.append])
        early, late = list(range(960, 200, -40)), [200, 160, 120, 80, 40, 0]
        assert (clean.steps, aware.steps) == (early, late)
        assert [r.t for r in records] == early + late
        for record in records:
            shown, t = (record.guided.prediction.x0, None) if record.t > 200 else (record.x_t, record.t)
            logits = mixture.log_joint(shown, t)
            torch.testing.assert_close(record.guided.aux.logits, logits)
            score, scale = (soft, 2.0) if record.t > 200 else (TemperedLogProb(), 3.0)
            y = torch.full((8,), Y)
            expected = scale * gradient(lambda v, t=t, score=score, y=y: score(mixture.log_joint(v, t), y), shown)
            torch.testing.assert_close(record.guided.score, expected)

    def test_one_half_may_be_off(self, mixture):
        clean, aware = Counting(mixture), Counting(mixture, noise_aware=True)
        guidance = SwitchedGuidance(
            ClassifierGuidance(clean, scale=0.0), ClassifierGuidance(aware, classifier_input="x_t"), 200
        )
        records = []
        draw(DDPM("ddim25"), mixture, guidance, 8, observers=[records.append])
        assert clean.steps == []
        assert [r.t for r in records if r.guided.score is not None] == aware.steps == [200, 160, 120, 80, 40, 0]

    def test_exact_halves_reach_the_floor(self, mixture, exact, floor):
        """Two halves that are both exact are exact together, wherever they meet."""
        halves = exact_guidance(mixture), exact_guidance(mixture)
        assert energy_distance(draw(DDPM("250"), mixture, SwitchedGuidance(*halves, 300)), exact) < floor


class TestTilted:
    n, group = 20, 5

    def run(self, mixture, noise, tilt=-2.0, sampler=None):
        records = []
        guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture), Tilted(tilt, self.group))
        sampler = sampler or DDPM("20")
        return sampler(mixture, noise, torch.full((self.n,), Y), guidance, [records.append]), records

    def test_gradients_are_shared_out_within_a_group(self, mixture):
        """Plain gradients times group size·softmax(tilt·S): the negative tilt gives the least likely sample the most."""
        for record in self.run(mixture, Gaussians(self.n))[1]:
            x0, y = record.guided.prediction.x0, record.y
            plain = gradient(lambda v, y=y: TemperedLogProb()(mixture.log_joint(v), y), x0)
            values = TemperedLogProb()(mixture.log_joint(x0), y).view(-1, self.group)
            weights = self.group * (-2.0 * values).softmax(1)
            assert torch.equal(weights.argmax(1), values.argmin(1))
            expected = plain * weights.flatten().view(-1, 1, 1, 1)
            torch.testing.assert_close(record.guided.score, expected.float(), atol=1e-5, rtol=1e-5)

    def test_a_sample_moves_its_own_group_alone(self, mixture):
        class OneMoved(Gaussians):
            def __call__(self):
                noise = super().__call__()
                noise[7] += 1.0
                return noise

        moved = (self.run(mixture, OneMoved(self.n))[0] - self.run(mixture, Gaussians(self.n))[0]).abs().amax((1, 2, 3))
        assert (moved[5:10] > 1e-4).all()
        assert (moved[:5] == 0).all()
        assert (moved[10:] == 0).all()

    def test_little_tilt_is_plain_guidance(self, mixture):
        guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture))
        plain = draw(DDPM("20"), mixture, guidance, n=self.n)
        slight, strong = (self.run(mixture, Gaussians(self.n), tilt)[0] for tilt in (-1e-6, -2.0))
        torch.testing.assert_close(slight, plain, atol=1e-4, rtol=0)
        assert (strong - plain).abs().max() > 0.1


class TestStreams:
    """A sample depends on its seed and index, not on its batch."""

    class Recorded(SampleStreams):
        def __init__(self, *args):
            super().__init__(*args)
            self.calls = []

        def __call__(self):
            self.calls.append(super().__call__())
            return self.calls[-1]

    def run(self, sampler, mixture, guidance, batches):
        images, noises = [], []
        for indices in batches:
            noise = self.Recorded([5] * len(indices), indices, mixture.image_shape)
            images.append(sampler(mixture, noise, torch.tensor([i % 3 for i in indices]), guidance))
            noises.append(torch.stack(noise.calls, 1))
        return torch.cat(images), torch.cat(noises)

    @pytest.mark.parametrize("sampler", [DDPM("8", recurrence=2), DDIM("8"), DDIM("8", eta=1.0)])
    @pytest.mark.parametrize(("at", "noise_aware"), [("x0", False), ("x_t", True), ("through_denoiser", False)])
    def test_samples_do_not_depend_on_their_batch(self, mixture, sampler, at, noise_aware):
        guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture, noise_aware), **seeing(at), scale=0.7)
        indices = list(range(12))
        together, noise = self.run(sampler, mixture, guidance, [indices])
        for size in (1, 4):
            batches = [indices[i : i + size] for i in range(0, 12, size)]
            images, numbers = self.run(sampler, mixture, guidance, batches)
            assert torch.equal(numbers, noise)
            torch.testing.assert_close(images, together, atol=1e-4, rtol=0)
        backwards, numbers = self.run(sampler, mixture, guidance, [indices[::-1]])
        assert torch.equal(numbers.flip(0), noise)
        torch.testing.assert_close(backwards.flip(0), together, atol=1e-4, rtol=0)
        assert len(together.flatten(1).unique(dim=0)) == 12  # no two samples share a stream

    def test_groups_of_a_tilted_score_do_not_depend_on_their_batch(self, mixture):
        guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture), Tilted(-2.0, 3))
        indices = list(range(21))
        together, noise = self.run(DDPM("20"), mixture, guidance, [indices])
        threes, numbers = self.run(DDPM("20"), mixture, guidance, [indices[i : i + 3] for i in range(0, 21, 3)])
        assert torch.equal(numbers, noise)
        torch.testing.assert_close(threes, together, atol=1e-4, rtol=0)
