"""The Gaussian mixture, whose every quantity is known, and what samplers and guidance do to it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from calib_guidance.denoisers.analytic import GaussianMixture, GaussianMixtureClassifier
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, SwitchedGuidance
from calib_guidance.rng import SampleStreams
from calib_guidance.samplers import DDIM, DDPM
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, TemperedLogProb, Tilted

# Full, unequal covariances and unequal weights; the classes overlap (Bayes error 0.16), so that guidance matters.
MEANS = [[-1.2, 0.4], [0.6, 1.1], [0.9, -0.8]]
COVARIANCES = [[[0.5, 0.2], [0.2, 0.3]], [[0.25, -0.12], [-0.12, 0.4]], [[0.6, -0.25], [-0.25, 0.35]]]
WEIGHTS = [0.5, 0.2, 0.3]
IDENTITY = [[[1.0, 0.0], [0.0, 1.0]]] * 3
Y = 1
N = 4000


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
    return ClassifierGuidance(GaussianMixtureClassifier(mixture, noise_aware=True), at="x_t", **settings)


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


class TestClosedForms:
    """Against torch.distributions, linear solves, autograd and finite differences, none of which share code with it."""

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
                prediction = model.trajectory(timesteps, labels)(x, i)
                assert torch.equal(prediction.x0, expected)
                assert prediction.variance_fraction is None
        assert (mixture.num_classes, conditional.num_classes, mixture.image_shape) == (None, 3, (2, 1, 1))
        assert not torch.allclose(mixture.posterior_mean(x, 0.5), mixture.posterior_mean(x, 0.5, y))

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

    def test_other_dimensions(self):
        """Three dimensions, two classes: density and Tweedie's formula again."""
        means, a = [[0.0, 1.0, -1.0], [1.0, 0.0, 2.0]], np.random.default_rng(0).normal(size=(2, 3, 3))
        covariances = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(3)
        model = GaussianMixture(means, covariances.tolist(), [1.0, 3.0])
        x = torch.randn(5, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        components = MultivariateNormal(torch.tensor(means, dtype=torch.float64), torch.tensor(covariances))
        expected = components.log_prob(x.flatten(1)[:, None]) + torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        torch.testing.assert_close(model.log_joint(x), expected)
        abar = float(model.schedule.alphas_cumprod[300])
        tweedie = (x + (1 - abar) * gradient(lambda v: model.log_prob(v, 300), x)) / math.sqrt(abar)
        torch.testing.assert_close(model.posterior_mean(x, abar), tweedie, atol=1e-11, rtol=1e-11)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((MEANS, COVARIANCES[:2]), "3 means of 2 numbers need 3 covariances"),
            ((MEANS, [[[1.0]]] * 3), "3 means of 2 numbers need 3 covariances"),
            ((MEANS, COVARIANCES, [1.0, 1.0]), "3 means of 2 numbers need 3 covariances and weights"),
            ((MEANS, [*COVARIANCES[:2], [[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
            ((MEANS, [1.0, 1.0, 0.0]), "positive definite"),
            ((MEANS, COVARIANCES, [1.0, 0.0, 1.0]), "weights positive"),
        ],
    )
    def test_what_is_no_mixture_is_an_error(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(*arguments)


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
                torch.testing.assert_close(record.guided.step_gradient, direction, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(record.guided.gradient, 2 * direction, atol=1e-5, rtol=1e-5)


def spread_after(sampler, schedule, sigma2, guided=0.0):
    """Variance of samples of N(0, σ²), by the recursion of a scalar linear map; ``guided``: s of the joint energy at x_t."""
    tables, variance = schedule.respace(sampler.steps), 1.0
    for i in reversed(range(len(tables))):
        abar, previous = tables.alphas_cumprod[i], tables.alphas_cumprod_prev[i]
        gain, score = math.sqrt(abar) * sigma2 / (abar * sigma2 + 1 - abar), -1 / (abar * sigma2 + 1 - abar)
        if isinstance(sampler, DDIM):
            epsilon = (1 - math.sqrt(abar) * gain) / math.sqrt(1 - abar) - math.sqrt(1 - abar) * guided * score
            x0 = (1 - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
            variance *= (math.sqrt(previous) * x0 + math.sqrt(1 - previous) * epsilon) ** 2
        else:
            added = tables.posterior_variance[max(i, 1)]
            slope = tables.posterior_mean_coef1[i] * gain + tables.posterior_mean_coef2[i] + added * guided * score
            variance = variance * slope**2 + (added if i else 0)
    return variance


class TestOneGaussian:
    """Every step is linear, so that the result is known in closed form at any number of steps."""

    sigma2 = 0.3
    model = GaussianMixture([[0.0, 0.0]], [0.3])

    def guidance(self, scale):
        # With one class the joint energy is log p_t(x_t) itself.
        return exact_guidance(self.model, score=TemperedLogProb(1.0, 0.0), scale=scale)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
    def test_ddim_is_a_known_factor(self, scale):
        sampler, x_T = DDIM("40"), Gaussians(50)()
        x = sampler(self.model, Gaussians(50), torch.zeros(50, dtype=torch.long), self.guidance(scale))
        factor = math.sqrt(spread_after(sampler, self.model.schedule, self.sigma2, scale))
        torch.testing.assert_close(x, factor * x_T, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
    def test_ddpm_has_a_known_variance(self, scale):
        sampler, n = DDPM("40", "fixed_small"), 20000
        x = sampler(self.model, Gaussians(n), torch.zeros(n, dtype=torch.long), self.guidance(scale)).double()
        expected = spread_after(sampler, self.model.schedule, self.sigma2, scale)
        # The relative standard error of a normal variance from 2n numbers is √(2/2n).
        assert abs(x.square().mean() / expected - 1) < 5 / math.sqrt(n)

    def test_a_gaussian_sharpens_as_theory_says(self):
        """p·pˢ of one Gaussian has the variance σ²/(1+s) where guidance follows the exact score of the clean target. It does
        not: guiding with s·log p_t at every t is known to give less; DDIM's limit is σ^(2(1+s)), from x' = −½(1+s)∇log p_t."""
        for scale in (1.0, 3.0):
            limit = spread_after(DDIM("1000"), self.model.schedule, self.sigma2, scale)
            assert limit == pytest.approx(self.sigma2 ** (1 + scale), rel=0.1)


def energy_distance(a, b):
    """2E|a−b| − E|a−a'| − E|b−b'| of samples ``(n, 2, 1, 1)``, unbiased: 0 on average where both have one distribution."""
    a, b = a.flatten(1), b.flatten(1)

    def within(v):
        return torch.cdist(v, v).sum(dtype=torch.float64) / (len(v) * (len(v) - 1))

    return float(2 * torch.cdist(a, b).mean(dtype=torch.float64) - within(a) - within(b))
