"""Convolutions with packed weights against PyTorch's own."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from calib_guidance.backend.convolutions import PackedConv2d, pack_convolutions
from calib_guidance.backend.counters import FlopCounter
from calib_guidance.classifiers import OffTheShelfClassifier


def frozen(*arguments, **options):
    torch.manual_seed(0)
    return nn.Conv2d(*arguments, **options).requires_grad_(False)


def output_and_gradient(network, x):
    x = x.clone().requires_grad_()
    y = network(x)
    return y.detach(), torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), x)[0]


SETTINGS = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "groups": g, "bias": g == 1}
    for (k, p), s, d, g in itertools.product([(1, 0), (3, 1), ((3, 2), (0, 1))], [1, (2, 3)], [1, 2], [1, 4])
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_output_and_gradient_are_pytorchs(settings):
    conv = frozen(8, 12, **settings)
    packed = PackedConv2d.of(conv)
    for size, layout in itertools.product(
        [(2, 8, 9, 7), (3, 8, 12, 13)], [torch.contiguous_format, torch.channels_last]
    ):
        x = torch.randn(size).to(memory_format=layout)
        for found, expected in zip(output_and_gradient(packed, x), output_and_gradient(conv, x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_the_weights_were_packed_for_does_not_show():
    """Bit for bit, so that a resumed run, which begins with another batch, makes the same images."""
    first, second = (PackedConv2d.of(frozen(64, 64, 3, padding=1)) for _ in range(2))
    sizes = [(1, 64, 32, 32), (50, 64, 4, 4), (3, 64, 9, 9)]
    images = [torch.randn(size) for size in sizes]
    found = [output_and_gradient(first, x) for x in images]
    again = [output_and_gradient(second, x) for x in reversed(images)][::-1]
    for (y, gradient), (expected, expected_gradient) in zip(found, again, strict=True):
        assert torch.equal(y, expected)
        assert torch.equal(gradient, expected_gradient)


def test_a_frozen_classifier_has_them_and_the_same_gradient():
    torch.manual_seed(0)
    plain = OffTheShelfClassifier("torchvision/resnet18", 10).eval().requires_grad_(False)
    tuned = copy.deepcopy(plain).freeze()
    x = torch.randn(2, 3, 64, 64)
    convolutions = [m for m in tuned.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    assert all(isinstance(m, PackedConv2d) for m in convolutions)
    for found, expected in zip(output_and_gradient(tuned, x), output_and_gradient(plain, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_operations_are_counted_as_ever():
    plain = nn.Sequential(frozen(8, 12, 3, stride=2, padding=1), nn.ReLU(), frozen(12, 4, 1))
    packed = copy.deepcopy(plain)
    pack_convolutions(packed)
    x = torch.randn(2, 8, 9, 9)
    counted = []
    for network in (plain, packed):
        with FlopCounter() as flops:
            output_and_gradient(network, x)
        counted.append(flops.get_total_flops())
    once = 2 * 2 * 5 * 5 * (8 * 12 * 3 * 3 + 12 * 4)
    assert counted == [2 * once, 2 * once]


def test_copies_and_files_hold_the_plain_weights():
    conv = PackedConv2d.of(frozen(8, 12, 3))
    x = torch.randn(2, 8, 9, 9)
    expected = conv(x)
    file = io.BytesIO()
    torch.save(conv, file)
    assert len(file.getvalue()) < 2 * conv.weight.nbytes
    file.seek(0)
    for other in (copy.deepcopy(conv), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    assert list(conv.state_dict()) == ["weight", "bias"]


def test_weights_that_change_are_packed_again():
    conv, other = PackedConv2d.of(frozen(8, 12, 3)), frozen(8, 12, 3)
    x = torch.randn(2, 8, 9, 9)
    conv(x)
    other.weight.mul_(2)
    conv.load_state_dict(other.state_dict())
    for found, expected in zip(output_and_gradient(conv, x), output_and_gradient(other, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_another_number_format_and_back_is_packed_again():
    conv = PackedConv2d.of(frozen(8, 12, 3))
    x = torch.randn(2, 8, 9, 9)
    conv(x)
    rounded = copy.deepcopy(conv).half().float()
    torch.testing.assert_close(conv.half().float()(x), nn.functional.conv2d(x, rounded.weight, rounded.bias))


def test_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        conv = frozen(8, 12, 3)
        packed = PackedConv2d.of(conv)
        inside = packed(torch.ones(1, 8, 4, 4))
    expected = nn.functional.conv2d(torch.ones(1, 8, 4, 4), conv.weight.clone(), conv.bias.clone())
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(packed(torch.ones(1, 8, 4, 4)), expected)


def test_functional_gradients_go_through():
    conv = frozen(8, 12, 3)
    packed, x = PackedConv2d.of(conv), torch.randn(2, 8, 9, 9)
    found, expected = (torch.func.grad(lambda x, c=c: c(x).square().sum())(x) for c in (packed, conv))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_fails_in_pytorchs_words():
    conv = PackedConv2d.of(frozen(8, 12, 3))
    for shape, words in (((2, 4, 9, 9), "8 channels"), ((2, 8, 2, 2), "Kernel size can't be greater")):
        with pytest.raises(RuntimeError, match=words):
            conv(torch.randn(shape))


def test_what_cannot_be_packed_is_convolved_as_ever():
    x = torch.randn(2, 8, 9, 9)
    conv = frozen(8, 12, 3)
    packed = PackedConv2d.of(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(x), conv(x))
        assert packed(x).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(copy.deepcopy(packed).to(dtype)(x.to(dtype)), copy.deepcopy(conv).to(dtype)(x.to(dtype)))
    assert packed.to("meta")(x.to("meta")).shape == (2, 12, 7, 7)
    alone = torch.randn(8, 9, 9)
    torch.testing.assert_close(PackedConv2d.of(conv)(alone), conv(alone))
    learning = PackedConv2d.of(frozen(8, 12, 3)).requires_grad_()
    learning(x).sum().backward()
    assert learning.weight.grad.abs().sum() > 0


def test_convolutions_of_other_kinds_stay():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 4, 1)
    )
    pack_convolutions(network)
    assert not any(isinstance(m, PackedConv2d) for m in network)


def test_a_second_derivative_is_refused():
    conv = PackedConv2d.of(frozen(8, 12, 3))
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    gradient = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
