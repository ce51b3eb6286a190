"""Ensembles of classifiers."""

import pytest
import torch
from torch import nn

from calib_guidance.classifiers import Ensemble, NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.networks import EncoderUNet, SmallResNet


def members():
    torch.manual_seed(0)
    return [OffTheShelfClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 4, temperature=t) for t in (1.0, 0.2)]


def test_probabilities_are_the_renormalized_geometric_mean():
    x = torch.randn(5, 3, 2, 2)
    a, b = members()
    product = (a(x).softmax(1) * b(x).softmax(1)).sqrt()
    expected = product / product.sum(1, keepdim=True)
    torch.testing.assert_close(Ensemble([a, b])(x).softmax(1), expected)
    torch.testing.assert_close(Ensemble([a, b])(x), product.log())


def test_the_gradient_is_the_mean_of_the_members():
    """Of the joint energy, the member's log-probabilities: Σ_j (∂log p_j/∂x)/M, from each member's weights by hand."""
    a, b = members()
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(Ensemble([a, b])(x)[0, 1], x)
    expected = torch.zeros(12)
    for member in (a, b):
        weight = member.network[1].weight / member.temperature
        p = member(x)[0].softmax(0)
        expected += (weight[1] - p @ weight) / 2
    torch.testing.assert_close(gradient.flatten(), expected)


def test_half_precision_members_are_averaged_in_float32():
    a, b = (member.half() for member in members())
    assert Ensemble([a, b])(torch.zeros(1, 3, 2, 2).half()).dtype == torch.float32


def test_members_are_frozen_checked_and_told_the_step():
    torch.manual_seed(0)
    network = EncoderUNet(8, 1, 32, 10, 1, channel_mult=(1,), num_head_channels=32)
    for parameter in network.parameters():  # the last layer begins at nought
        parameter.data += 0.05 * torch.randn_like(parameter)
    ensemble = Ensemble([OffTheShelfClassifier(SmallResNet(), 10), NoiseAwareClassifier(network)]).freeze()
    assert not any(p.requires_grad or m.training for m in ensemble.modules() for p in m.parameters(recurse=False))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ensemble.classifiers[0].modules())  # folded, as when alone
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(ensemble(x, torch.tensor([0])), ensemble(x, torch.tensor([900])))
    with pytest.raises(ValueError, match="3"):
        ensemble.check_image((3, 8, 8))
    ensemble.check_image((1, 8, 8))


def test_refused():
    a, _ = members()
    with pytest.raises(ValueError, match="at least two classifiers, got 1"):
        Ensemble([a])
    with pytest.raises(ValueError, match=r"theirs number \[4, 10\]"):
        Ensemble([a, OffTheShelfClassifier(SmallResNet(), 10)])
