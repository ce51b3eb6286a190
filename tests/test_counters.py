"""FLOPs and memory of a product of matrices are known exactly, and the same on the meta device."""

import contextlib

import pytest
import torch
from torch import nn

from calib_guidance.backend.counters import FlopCounter, KnownShapes, PeakMemory


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_product_of_matrices(device):
    with FlopCounter() as flops, PeakMemory() as memory:
        for _ in range(3):
            with torch.no_grad():
                hidden = torch.ones(4, 10, device=device) @ torch.ones(10, 20, device=device)
                out = hidden @ torch.ones(20, 5, device=device)
            del hidden, out
    assert flops.get_total_flops() == 3 * 2 * 4 * (10 * 20 + 20 * 5)
    # The last matrices live while the product of the first is there; its factors are gone.
    assert memory.peak == 4 * max(40 + 200 + 80, 80 + 100 + 20)


def test_gradient_of_a_modules_input():
    """torch's own counter cannot: its hooks on modules break autograd.grad of an input that is a leaf."""
    layer, x = nn.Linear(3, 5, bias=False), torch.ones(2, 3, requires_grad=True)
    with FlopCounter() as flops:
        torch.autograd.grad(layer(x).sum(), x)
    assert flops.get_total_flops() == 2 * 2 * 2 * 3 * 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_were_there_before_are_not_counted(device):
    weight, x = torch.ones(20, 10, device=device), torch.ones(4, 10, device=device)
    with PeakMemory() as memory, torch.no_grad():
        nn.functional.linear(x, weight)
        weight.flatten().view(2, -1)
    assert memory.peak == 4 * 4 * 20


def test_shapes_on_the_meta_device_are_found_out_once_and_are_the_same():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Flatten()
    )
    network.to("meta")

    def count(side, *modes):
        x = torch.empty(2, 1, side, side, device="meta", requires_grad=True)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            flops, memory = stack.enter_context(FlopCounter()), stack.enter_context(PeakMemory())
            output = network(x)
            (gradient,) = torch.autograd.grad(output.sum(), x)
        return flops.get_total_flops(), memory.peak, output.shape, output.stride(), gradient.shape

    known = KnownShapes()
    expected = {side: count(side) for side in (8, 12)}
    assert 0 < expected[8][0] < expected[12][0]
    for side in (8, 8, 12, 12, 8):
        assert count(side, known) == expected[side]
    found = len(known._known)
    assert found > 5
    with known:
        for _ in range(2):
            network[0].reset_parameters()
        for _ in range(2):  # whose shape changes is not remembered
            assert torch.empty(2, 3, device="meta").t_().shape == (3, 2)
            assert torch.empty(2, 3, device="meta").resize_(6).shape == (6,)
    found, x = len(known._known), torch.empty(2, 64, device="meta")
    with known:
        assert x.view(128).untyped_storage()._cdata == x.untyped_storage()._cdata
        assert torch.equal(torch.ones(2) * 2, torch.full((2,), 2.0))  # other devices compute
    assert len(known._known) == found
