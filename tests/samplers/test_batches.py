"""A sample is a function of configuration, seed and index: neither batch size nor order enters."""

import pytest
import torch

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
from calib_guidance.networks import SmallResNet
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, UniPC
from calib_guidance.scores import DivergenceRegularized, Tilted
from tests.digits import digits_denoiser

COUNT = 35


@pytest.fixture
def denoiser(in_root):
    return digits_denoiser(class_conditional=False)


def guidance(score):
    network = SmallResNet()
    classifier = OffTheShelfClassifier(network, 10, "checkpoints/digits/classifier.safetensors", softplus_beta=3.0)
    return ClassifierGuidance(classifier, score, schedule=GuidanceSchedule(0.0))


def sample(denoiser, sampler, guide, size, order=None):
    """Images by index and the noise of the first step, made in batches of ``size`` of ``order``; NaN where it leaves out."""
    order = torch.arange(COUNT) if order is None else order
    images, noises = torch.full((2, COUNT, 1, 8, 8), torch.nan)
    for rows in order.split(size):
        streams = SampleStreams([0] * len(rows), rows.tolist(), (1, 8, 8))
        drawn = []

        def noise(streams=streams, drawn=drawn):
            drawn.append(streams())
            return drawn[-1].clone()

        images[rows] = sampler(denoiser, noise, rows % 10, guide)
        noises[rows] = drawn[-1]
    return images, noises


# Few guided steps of the SDE from σ = 80 amplify rounding a thousandfold, hence 16.
@pytest.mark.parametrize(
    "sampler",
    [DDPM("5"), DDIM("ddim5", eta=0.5), DPMSolver(5, sde=True, sigma_max=16.0), UniPC(5)],
    ids=["ddpm", "ddim", "dpm_solver_sde", "unipc"],
)
def test_batch_size_and_order_change_no_noise_and_images_by_rounding_only(denoiser, sampler):
    guide = guidance(DivergenceRegularized("js", tau2=0.8))
    expected, expected_noise = sample(denoiser, sampler, guide, 32)
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    every = torch.arange(COUNT)
    for size, order in ((1, every[33:]), (3, every[29:]), (16, every[15:]), (7, shuffled[:14])):
        images, noise = sample(denoiser, sampler, guide, size, order)
        assert torch.equal(noise[order], expected_noise[order])
        torch.testing.assert_close(images[order], expected[order], atol=1e-4, rtol=0)
    again, _ = sample(denoiser, sampler, guide, 32, every[:32])
    assert torch.equal(again[:32], expected[:32])  # the same batch: the same bytes


def test_tilted_groups_depend_on_no_batch_size(denoiser):
    guide = guidance(Tilted(-0.5, 5))
    expected, _ = sample(denoiser, DDPM("5"), guide, COUNT)
    for size, order in ((5, torch.arange(15)), (30, torch.arange(30))):
        images, _ = sample(denoiser, DDPM("5"), guide, size, order)
        torch.testing.assert_close(images[order], expected[order], atol=1e-4, rtol=0)
