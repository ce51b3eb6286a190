"""FLOPs and memory of a product of matrices are known exactly, and the same on the meta device."""

import pytest
import torch
from torch import nn

from calib_guidance.backend.counters import FlopCounter, PeakMemory


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
