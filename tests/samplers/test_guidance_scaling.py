"""Guidance over steps of any length: against short DDPM steps, closed forms of one Gaussian, a mixture and the digits."""

import math

import numpy as np
import pytest
import torch
from test_heun import streams
from torch import nn

from calib_guidance.classifiers import Classifier, GaussianMixtureClassifier, OffTheShelfClassifier
from calib_guidance.denoisers import GaussianMixture
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import SmallResNet
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, UniPC
from calib_guidance.samplers.guidance_scaling import ddpm_equivalent_shift
from calib_guidance.scores import TemperedLogProb
from tests.digits import digits_denoiser


class Slope(Classifier):
    """Logits whose gradient is the same everywhere."""

    num_classes = 3

    def __init__(self, gradient):
        super().__init__()
        self.gradient, self.calls = nn.Parameter(torch.tensor(gradient)), 0

    def forward(self, x, t=None):
        self.calls += 1
        return (x.flatten(1) @ self.gradient[:, None]).expand(-1, self.num_classes)


def slope(gradient, **options):
    return ClassifierGuidance(Slope(gradient), TemperedLogProb(1.0, 0.0), **options)


def gained(sampler, denoiser, guidance, n=1, y=None):
    """What guidance moves each sample by."""
    y = torch.zeros(n, dtype=torch.long) if y is None else y
    return (sampler(denoiser, streams(n, denoiser), y, guidance) - sampler(denoiser, streams(n, denoiser), y)).flatten(
        1
    )


@pytest.mark.parametrize("data_std", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("exponent", [1.0, 1.25, 2.0])
def test_the_closed_form_is_the_integral(data_std, exponent):
    sigma, sigma_next = np.array([0.02, 0.7, 5.0, 80.0, 3e4]), np.array([0.0, 0.02, 0.7, 5.0, 80.0])
    found = ddpm_equivalent_shift(sigma, sigma_next, data_std, exponent)
    for high, low, value in zip(sigma, sigma_next, found, strict=True):
        edges = np.append(0.0, np.geomspace(1e-7, high, 200_001)) if low == 0 else np.geomspace(low, high, 200_001)
        middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        # 2·(1−ᾱ)/√ᾱ·k² dσ/σ, the sampler leaves k'^p of it.
        abar, kept = 1 / (1 + middle**2), data_std**2 / (data_std**2 + middle**2)
        left = (2 * (1 - abar) / np.sqrt(abar) * kept / middle * width).sum()
        expected = left / (data_std**2 / (data_std**2 + low**2)) ** (exponent / 2)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


VARIANCES = (0.25, 1.0, 4.0)


@pytest.fixture(scope="module")
def moved_by_ddpm():
    """What a thousand steps of DDPM move a Gaussian of each variance by: classes of one model, all at once."""
    classes = GaussianMixture([[0.3, -0.2]] * 3, VARIANCES, class_conditional=True)
    moved = gained(DDPM("1000"), classes, slope([0.2, -0.1]), n=3, y=torch.arange(3))
    return dict(zip(VARIANCES, moved, strict=True))


@pytest.mark.parametrize("variance", VARIANCES)
def test_few_steps_move_a_gaussian_nearly_as_a_thousand_of_ddpm_do(variance, moved_by_ddpm):
    denoiser, guidance = GaussianMixture([[0.3, -0.2]], [variance]), slope([0.2, -0.1])
    expected, d = moved_by_ddpm[variance], math.sqrt(variance)
    samplers = {
        "sde": lambda n, **k: DPMSolver(n, sde=True, **k),
        "ode": lambda n, **k: DPMSolver(n, **k),
        "unipc": lambda n, **k: UniPC(n, **k),
        "ddim": lambda n, **k: DDIM(4 * n if n < 100 else 2 * n, **k),
        "ddim_eta": lambda n, **k: DDIM(4 * n if n < 100 else 2 * n, 0.5, **k),
    }
    for name, sampler in samplers.items():

        def error(n, term, sampler=sampler):
            found = gained(sampler(n, guidance_scaling=term, data_std=d), denoiser, guidance)
            return float(((found - expected) / expected).abs().max())

        assert error(100, "ddpm_equivalent") < 0.02, name
        assert error(25, "ddpm_equivalent") < 0.03, name
        # The SDE's own steps are exact here; those of the ODE samplers are of second order.
        six = error(6, "ddpm_equivalent")
        assert six < (0.01 if name == "sde" else 0.1), name
        assert six < 0.3 * error(6, "score"), name


def test_where_the_rule_is_the_default():
    """Of the SDE, whose steps d hardly changes; the ODE's guidance is proportional to d at high noise."""
    denoiser, guidance = GaussianMixture([[0.3, -0.2]], [0.25]), slope([0.2, -0.1])

    def moved(kind, **options):
        return gained(kind(steps=40, **options), denoiser, guidance)

    rule = {"guidance_scaling": "ddpm_equivalent"}
    torch.testing.assert_close(moved(DPMSolver, sde=True), moved(DPMSolver, sde=True, **rule, data_std=0.5))
    for ode in (DPMSolver, UniPC):
        torch.testing.assert_close(moved(ode), moved(ode, guidance_scaling="score"))
        half, complete = (moved(ode, **rule, data_std=d) for d in (0.5, 2.0))
        assert (complete / half).min() > 2
    half, complete = (moved(DPMSolver, sde=True, **rule, data_std=d) for d in (0.5, 2.0))
    assert (complete / half).max() < 1.2
    torch.testing.assert_close(moved(DPMSolver, sde=True, **rule), half)


def energy_distance(a, b):
    def mean(x, y):
        return torch.cdist(x.flatten(1), y.flatten(1)).mean()

    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def test_a_guided_mixture_in_few_steps_is_nearer_to_that_of_250():
    mixture = GaussianMixture([[0.6, 0.4], [-0.6, 0.4], [0.0, -0.6]], [0.1, 0.06, 0.08])
    guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture), scale=1.0)
    n, y = 600, torch.arange(600) % 3
    expected = DDPM("250")(mixture, streams(n, mixture), y, guidance)

    def distance(steps, **options):
        options = {"guidance_scaling": "ddpm_equivalent", "data_std": 0.3} | options
        found = DPMSolver(steps, **options)(mixture, streams(n, mixture), y, guidance)
        return sum(energy_distance(found[y == k], expected[y == k]) for k in range(3)) / 3

    assert distance(10, sde=True) < 0.04 < 5 < distance(10, sde=True, guidance_scaling="score")
    assert distance(25, sde=True) < 0.015
    assert distance(10) < 0.6 < 1 < distance(10, guidance_scaling="score")
    assert distance(25) < 0.1 * distance(25, guidance_scaling="score")


def test_digits_in_ten_steps_are_of_their_class():
    """Ten steps at the scale of 250. Without the rule guidance overshoots and no class is left."""
    denoiser = digits_denoiser(class_conditional=False)
    classifier = OffTheShelfClassifier(
        SmallResNet(10, 1, [32, 64, 64], 1), 10, "checkpoints/digits/classifier.safetensors", softplus_beta=3.0
    )
    eval_classifier = OffTheShelfClassifier(
        SmallResNet(10, 1, [48, 96, 48], 2), 10, "checkpoints/digits/eval_classifier.safetensors"
    )
    y, guidance = torch.arange(100) % 10, ClassifierGuidance(classifier, TemperedLogProb(1.0, 0.8))
    right = []
    for term in ("ddpm_equivalent", "score"):
        images = DPMSolver(10, sde=True, guidance_scaling=term)(denoiser, streams(100, denoiser), y, guidance)
        with torch.no_grad():
            right.append(float((eval_classifier(images.clamp(-1, 1)).argmax(1) == y).float().mean()))
    assert right[0] > 0.9
    assert right[1] < 0.5


def test_what_cannot_be_says_why():
    for sampler in (DDIM, DPMSolver, UniPC):
        with pytest.raises(ValueError, match="guidance_scaling: unknown 'splat'; known: score, ddpm_equivalent"):
            sampler(guidance_scaling="splat")
        with pytest.raises(ValueError, match="data_std must be above 0"):
            sampler(data_std=0.0)
        with pytest.raises(ValueError, match=r"set data_std .*, guidance_scaling to score, or take an SDE"):
            sampler(guidance_scaling="ddpm_equivalent")
