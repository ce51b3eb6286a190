"""Denoisers under other class numbers."""

import pytest
import torch

from calib_guidance.denoisers import ADMDenoiser, Combination, RemapClasses
from calib_guidance.networks import UNet


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = UNet(8, 3, 32, 6, 1, (2,), channel_mult=(1, 2), num_classes=10, num_head_channels=32)
    for parameter in network.parameters():  # the last layer begins at nought
        parameter.data += 0.05 * torch.randn_like(parameter)
    return ADMDenoiser(network)


def predict(denoiser, y, x):
    with torch.no_grad():
        return denoiser.prepare(denoiser.schedule.at([100, 700]), y)(x, 1)


def test_labels_ask_for_the_classes_they_stand_for(denoiser):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    remapped = RemapClasses(denoiser, [7, 2, 7])
    found = predict(remapped, torch.tensor([0, 1, 2, -1]), x)
    expected = predict(denoiser, torch.tensor([7, 2, 7, -1]), x)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert (found.x0 - predict(denoiser, torch.tensor([0, 1, 2, -1]), x).x0).abs().amax((1, 2, 3))[:3].min() > 1e-3
    torch.testing.assert_close(predict(remapped, None, x), predict(denoiser, None, x), atol=0, rtol=0)
    assert remapped.num_classes == 3
    for name in ("schedule", "image_shape", "clip", "has_learned_variance", "nfe"):
        assert getattr(remapped, name) == getattr(denoiser, name)
    doubled = torch.ones(1, 3, 8, 8)
    denoiser.decode = lambda x0: 2 * x0
    assert torch.equal(remapped.decode(doubled), 2 * doubled)
    del denoiser.decode


def test_classifier_free_guidance_goes_around(denoiser):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = predict(Combination(RemapClasses(denoiser, [7, 2])), torch.tensor([0, 1]), x)
    expected = predict(Combination(denoiser), torch.tensor([7, 2]), x)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_refused(denoiser):
    with pytest.raises(ValueError, match=r"0 … 9, got \[10, -1\]"):
        RemapClasses(denoiser, [3, 10, -1])
    with pytest.raises(ValueError, match="one or more of"):
        RemapClasses(denoiser, [])
    with pytest.raises(ValueError, match="needs a class-conditional denoiser"):
        RemapClasses(ADMDenoiser(denoiser.network, class_conditional=False), [0])
