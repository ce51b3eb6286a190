"""The cost model: operators are counted right, and their time follows from the device's rates."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib_guidance.backend.cost import GPUS, Machine, Measured, Work, WorkCounter, machine_of


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_of_a_network_and_its_gradient(device):
    conv, linear = nn.Conv2d(3, 5, 3, padding=1, device=device), nn.Linear(5 * 16, 7, bias=False, device=device)
    x = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
    for parameter in (*conv.parameters(), *linear.parameters()):
        parameter.requires_grad_(False)
    with WorkCounter() as counter:
        out = linear(F.silu(conv(x)).flatten(1))
        forward = counter.take()
        torch.autograd.grad(out.sum(), x)
        backward = counter.take()
    assert [work.kind for work in forward] == ["conv", "transcendental", "matmul"]
    products = 2 * 2 * 16 * 5 * 27, 0, 2 * 2 * 80 * 7
    assert [work.flops for work in forward] == list(products)
    silu = forward[1]
    assert silu.bytes == 4 * 2 * (2 * 5 * 16)  # one image read, one written
    assert (forward[0].rows, forward[0].width) == (32, 5)
    assert (forward[2].rows, forward[2].width) == (2, 7)
    assert forward[0].bytes == 4 * (2 * 3 * 16 + 5 * 27 + 5 + 2 * 5 * 16)
    kinds = {work.kind: work.flops for work in backward if work.flops}
    assert kinds == {"matmul": products[2], "conv_backward": products[0]}  # of the image alone
    assert not counter.works


def test_views_are_free_and_halves_are_known():
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    with WorkCounter() as counter:
        y = x.view(2, 12).transpose(0, 1)[1:]
        y + 1
    (work,) = counter.works
    assert (work.kind, work.half, work.bytes) == ("memory", True, 2 * 2 * 22)


def test_each_operator_takes_what_limits_it():
    machine = Machine("m", half=100.0, single=10.0, bandwidth=50.0, launch=0.5, reached=0.5)
    product = Work("matmul", 200.0, 4.0, False, 1, 1)
    assert machine.seconds([product]) == pytest.approx(0.5 + 200 / (0.5 * 10))
    assert machine.seconds([product._replace(half=True)]) == pytest.approx(0.5 + 200 / (0.5 * 100))
    assert machine.seconds([product._replace(kind="conv")]) == pytest.approx(0.5 + 200 / (0.5 * 50))  # TF32
    copy = Work("memory", 0.0, 400.0, False, 1, 1)
    assert machine.seconds([copy, product]) == pytest.approx(1.0 + 400 / 40 + 40)


def test_measured_speeds_are_met_and_interpolated():
    table = Measured.of([(64,), (1024,)], [10.0, 1000.0])
    assert table.at(64) == pytest.approx(10, rel=0.05)
    assert table.at(256) == pytest.approx(100)  # half-way, in logarithms
    assert table.at(1024) == pytest.approx(1000, rel=0.05)
    rates = {"matmul": Measured.of([(8, 4, 2)], [32.0])}
    machine = machine_of(rates, {"memory": Measured.of([(16,)], [8.0])}, launch=0.25, name="here")
    work = Work("attention", 128.0, 16.0, False, 8, 4)
    assert machine.seconds([work]) == pytest.approx(0.25 + 4)  # in place of a kind that was not measured, a product
    assert machine.seconds([work._replace(flops=0.0)]) == pytest.approx(0.25 + 2)


def test_named_gpus_are_ordered_as_they_are():
    """By memory an H200 exceeds an H100, whose products are as fast; none is faster than its peak."""
    product, copy = Work("matmul", 1e15, 1.0, True, 1, 1), Work("memory", 0.0, 1e12, True, 1, 1)
    assert GPUS["H200"].seconds([copy]) < GPUS["H100"].seconds([copy]) < GPUS["A100"].seconds([copy])
    assert GPUS["H200"].seconds([product]) == GPUS["H100"].seconds([product]) > 1e15 / 989e12
