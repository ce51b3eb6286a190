"""A classifier on top of combined predictions."""

import itertools

import pytest
import torch

from calib_guidance.classifiers import GaussianMixtureClassifier
from calib_guidance.denoisers import (
    APG,
    FDG,
    MAMBOG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Combination,
    FeedbackGuidance,
    GaussianMixture,
    IndependentCondition,
    RescaledGuidance,
    Scheduled,
)
from calib_guidance.diffusion import Interval, SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GradientStabilizer, match_norm
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC

MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02], class_conditional=True)
Y = torch.arange(3)
# FDG has no bands of single pixels.
RULES = {
    "cfg": lambda: ClassifierFreeGuidance(2.0),
    "rescaled": lambda: RescaledGuidance(3.0),
    "apg": lambda: APG(3.0),
    "zero_star": lambda: CFGZeroStar(2.0),
    "tcfg": lambda: TCFG(2.0),
    "mambo_g": lambda: MAMBOG(3.0),
    "cfg_plus_plus": lambda: CFGPlusPlus(),
    "feedback": lambda: FeedbackGuidance(temperature=0.1, offset=-0.5),
    "scheduled": lambda: Scheduled(),
}
SAMPLERS = {"ddpm": DDPM("4"), "ddim": DDIM(4), "heun": Heun(4), "dpm": DPMSolver(4), "unipc": UniPC(4)}


def guidance(**options):
    return ClassifierGuidance(GaussianMixtureClassifier(MIXTURE), scale=2.0, **options)


def run(sampler, denoiser, guide=None, rows=Y):
    noise = SampleStreams([0] * len(rows), rows.tolist(), MIXTURE.image_shape)
    sampler.check(denoiser, guide)
    return sampler(denoiser, noise, rows % 3, guide)


@pytest.mark.parametrize(("rule", "sampler"), list(itertools.product(RULES, SAMPLERS)))
def test_every_rule_with_a_classifier_in_every_sampler(rule, sampler):
    if rule == "cfg_plus_plus" and not SAMPLERS[sampler].renoises:
        return
    every, steady = torch.arange(16), GradientStabilizer(ema=0.8)
    for options in ({"stabilizer": steady}, {"apply_to": "cfg_residual"}, {"backprop_through_denoiser": True}):
        denoiser = Combination(MIXTURE, RULES[rule]())
        expected = run(SAMPLERS[sampler], denoiser, guidance(**options), every)
        assert expected.isfinite().all()
        assert not torch.equal(expected, run(SAMPLERS[sampler], denoiser, rows=every))
        assert torch.equal(run(SAMPLERS[sampler], denoiser, guidance(**options), every), expected)  # no state is left
        for rows in ([5], [14, 0, 3]):
            found = run(SAMPLERS[sampler], denoiser, guidance(**options), torch.tensor(rows))
            torch.testing.assert_close(found, expected[rows], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("which", ["combined", "conditional", "unconditional"])
def test_the_classifier_sees_the_prediction_that_it_is_told_to(which):
    levels = MIXTURE.schedule.at([200])
    x = SampleStreams([0] * 3, range(3), MIXTURE.image_shape)()
    predict = Combination(MIXTURE, ClassifierFreeGuidance(3.0)).prepare(levels, Y)
    seen = {
        "combined": predict(x, 0).x0,
        "conditional": MIXTURE.prepare(levels, Y)(x, 0).x0,
        "unconditional": MIXTURE.prepare(levels, None)(x, 0).x0,
    }
    guided = guidance(classifier_prediction=which).prepare(levels, Y)(predict, x, 0)
    logits = GaussianMixtureClassifier(MIXTURE)(seen[which], torch.full((3,), 200))
    torch.testing.assert_close(guided.aux.logits, logits)
    torch.testing.assert_close(guided.prediction.x0, seen["combined"])
    # Where nothing is combined there is one prediction.
    alone = Combination(MIXTURE, interval=Interval([500, 600])).prepare(levels, Y)
    found = guidance(classifier_prediction=which).prepare(levels, Y)(alone, x, 0)
    torch.testing.assert_close(found.prediction.x0, seen["conditional"])


def test_the_residual_of_algorithm_3_is_that_of_the_rule():
    levels = MIXTURE.schedule.at([200])
    x = SampleStreams([0] * 3, range(3), MIXTURE.image_shape)()
    negative = MIXTURE.prepare(levels, None)(x, 0).x0
    for name, rule in RULES.items():
        plain, predict = (Combination(MIXTURE, rule()).prepare(levels, Y) for _ in range(2))
        plain, guided = plain(x, 0), guidance(apply_to="cfg_residual").prepare(levels, Y)(predict, x, 0)
        shift = 2.0 * match_norm(guided.aux.gradient, plain.x0 - negative)
        torch.testing.assert_close(guided.prediction.x0 - plain.x0, shift, atol=1e-5, rtol=1e-4, msg=name)


def test_a_classifier_is_as_strong_under_cfg_plus_plus_as_under_its_equal():
    """At λ = (σ − σ')/σ·w CFG++ is classifier-free guidance in DDIM, and so it is with a classifier."""
    sampler = DDIM(2)
    sigma = sampler.levels(MIXTURE).sigmas
    weight = 1.3 * sigma[1] / (sigma[1] - sigma[0])
    first = []
    for rule in (CFGPlusPlus(1.3 * 0.7), ClassifierFreeGuidance(0.7 * weight)):
        records = []
        noise = SampleStreams([0] * 3, range(3), MIXTURE.image_shape)
        sampler(Combination(MIXTURE, rule), noise, Y, guidance(classifier_prediction="conditional"), [records.append])
        first.append(records[0].x_next)
    torch.testing.assert_close(*first, atol=1e-5, rtol=1e-4)


def test_a_random_negative_with_a_classifier():
    denoiser = Combination(MIXTURE, FeedbackGuidance(temperature=0.1, offset=-0.5), IndependentCondition())
    expected = run(DDIM(5, eta=1.0), denoiser, guidance())
    one = run(DDIM(5, eta=1.0), denoiser, guidance(), torch.tensor([1]))
    torch.testing.assert_close(one, expected[[1]], atol=1e-4, rtol=1e-3)


def test_fdg_needs_images():
    with pytest.raises(ValueError, match="fewer weights"):
        run(DDIM(2), Combination(MIXTURE, FDG()))
