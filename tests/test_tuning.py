"""The tuned arithmetic against PyTorch's own operators, and the switch between them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from calib_guidance.backend import tuning
from calib_guidance.backend.convolutions import PackedConv2d
from calib_guidance.classifiers import NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.networks import EncoderUNet, UNet

# Largest difference over the largest value: a few roundings of float32 per layer.
TOLERANCE = 1e-5


def unfilled(network):
    """The layers that begin at zero get weights, so that every part shows in the output."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False)


def close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


ADM = {"model_channels": 64, "num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
ADM |= {"num_head_channels": 32, "use_scale_shift_norm": True, "resblock_updown": True}


@pytest.mark.parametrize("grad", [False, True])
def test_the_unet_is_equal(grad):
    network = unfilled(UNet(16, 3, num_classes=5, **ADM))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, -1])
    with torch.set_grad_enabled(grad):
        tuned = network(x, t, y)
        with tuning.plain():
            assert not tuning.enabled()
            plain = network(x, t, y)
    assert tuning.enabled()
    assert not torch.equal(tuned, plain)  # otherwise one of them is not what it says
    close(tuned, plain)


def test_the_noise_aware_classifier_and_its_gradient_are_equal():
    classifier = NoiseAwareClassifier(unfilled(EncoderUNet(16, 3, out_channels=7, **ADM))).freeze()
    x = torch.randn(2, 3, 16, 16).requires_grad_()
    found = []
    for switch in (tuning.enabled, tuning.plain):
        with switch() if switch is tuning.plain else torch.enable_grad():
            logits = classifier(x, torch.tensor([3, 700]))
            found.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), x)[0]))
    for tuned, plain in zip(*found, strict=True):
        close(tuned, plain)


def test_packed_convolutions_are_equal(monkeypatch):
    torch.manual_seed(0)
    classifier = OffTheShelfClassifier("torchvision/resnet18", 10).freeze()
    assert any(isinstance(module, PackedConv2d) for module in classifier.modules())
    x = torch.randn(2, 3, 64, 64).requires_grad_()
    tuned = classifier(x)
    tuned_gradient = torch.autograd.grad(tuned[:, 0].sum(), x)[0]
    monkeypatch.setattr(PackedConv2d, "packed", None)  # nothing is packed on the plain path
    with tuning.plain():
        plain = classifier(x)
        plain_gradient = torch.autograd.grad(plain[:, 0].sum(), x)[0]
    close(tuned, plain)
    close(tuned_gradient, plain_gradient)


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, True)])
def test_the_environment_sets_the_switch(value, expected, monkeypatch):
    monkeypatch.delenv("CALIB_GUIDANCE_TUNED", raising=False)
    if value is not None:
        monkeypatch.setenv("CALIB_GUIDANCE_TUNED", value)
    again = {}
    exec(Path(tuning.__file__).read_text(), again)
    assert again["enabled"]() == expected
