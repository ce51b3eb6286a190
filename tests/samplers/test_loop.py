"""The contracts between denoisers, guidance and samplers: calls, and what the loop tells those who watch it."""

import pytest
import torch

from calib_guidance.classifiers import GaussianMixtureClassifier
from calib_guidance.denoisers import Combination, GaussianMixture
from calib_guidance.diffusion import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, SwitchedGuidance
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC

MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02], class_conditional=True)
SAMPLERS = {"ddpm": DDPM(5, recurrence=2), "ddim": DDIM(5), "heun": Heun(5), "dpm": DPMSolver(5), "unipc": UniPC(5)}


def x_t():
    return SampleStreams([0] * 3, range(3), MIXTURE.image_shape)()


@pytest.mark.parametrize("denoiser", [MIXTURE, Combination(MIXTURE)], ids=["plain", "combination"])
def test_a_denoiser_can_be_called(denoiser):
    y = torch.arange(3)
    predict = denoiser.prepare(denoiser.schedule.at([100, 500, 900]), y)
    torch.testing.assert_close(denoiser(x_t(), 500, y).x0, predict(x_t(), 1).x0)
    found = denoiser(x_t(), torch.tensor([100, 500, 900]), y).x0
    for n in range(3):
        torch.testing.assert_close(found[n], predict(x_t(), n).x0[n])


def test_without_labels_a_denoiser_predicts_for_all_classes():
    expected = MIXTURE(x_t(), 500, torch.full((3,), -1)).x0
    torch.testing.assert_close(MIXTURE(x_t(), 500).x0, expected)


@pytest.mark.parametrize("options", [{}, {"classifier_input": "x_t"}, {"backprop_through_denoiser": True}])
def test_guidance_can_be_called(options):
    """At t = 500 the score is the prepared one, and shifts nothing."""
    y, levels = torch.arange(3), MIXTURE.schedule.at([100, 500])
    late = ClassifierGuidance(GaussianMixtureClassifier(MIXTURE), scale=2.0, **options)
    for guidance in (late, SwitchedGuidance(ClassifierGuidance(late.classifier, scale=9.0), late, 500)):
        found = guidance(MIXTURE, x_t(), 500, y)
        expected = guidance.prepare(levels, y)(MIXTURE.prepare(levels, y), x_t(), 1)
        torch.testing.assert_close(found.score, expected.score)
        torch.testing.assert_close(found.score, 2 * found.aux.gradient)
        torch.testing.assert_close(found.prediction.x0, MIXTURE(x_t(), 500, y).x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_progress_counts_the_steps(name):
    seen, records = [], []
    noise = SampleStreams([0] * 3, range(3), MIXTURE.image_shape)
    sampler = SAMPLERS[name]
    sampler(MIXTURE, noise, torch.arange(3), None, [records.append], progress=lambda *step: seen.append(step))
    assert seen == [(i, 5) for i in range(1, 6)]
    assert [r.i for r in records] == [i for i in range(4, -1, -1) for _ in range(sampler.recurrence)]


@pytest.mark.parametrize(
    ("sampler", "start"),
    [
        (DDPM("1"), "t = 0 of 1000"),
        (DDIM(1), "t = 0 of 1000"),
        (DDPM("5,0,0,0"), "t = 249 of 1000"),
        (UniPC(1, spacing="timesteps"), "t = 0 of 1000"),
        (Heun(3, sigma_max=0.5), "σ = 0.5"),
    ],
)
def test_pure_noise_is_not_an_image_of_a_clean_level(sampler, start):
    noise = SampleStreams([0] * 3, range(3), MIXTURE.image_shape)
    for run in (lambda: sampler.check(MIXTURE, None), lambda: sampler(MIXTURE, noise, torch.arange(3))):
        with pytest.raises(ValueError, match=f"starts from pure noise.*{start}.*steps to at least 2.*sigma_max"):
            run()


@pytest.mark.parametrize("sampler", [DPMSolver(1), DPMSolver(1, sde=True), UniPC(1), Heun(1), DDIM("2")])
def test_a_single_step_from_pure_noise_ends_at_the_mean_of_the_class(sampler):
    noise, y = SampleStreams([0] * 3, range(3), MIXTURE.image_shape), torch.arange(3)
    images = sampler(MIXTURE, noise, y).flatten(1)
    assert (images - MIXTURE.means[y]).abs().max() < 1
    assert torch.cdist(images.double(), MIXTURE.means).argmin(1).tolist() == [0, 1, 2]
