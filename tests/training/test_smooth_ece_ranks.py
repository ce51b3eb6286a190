"""Binned Smooth ECE over two ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from calib_guidance.training import binned_smooth_ece
from tests import processes


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def two_ranks(rank, folder):
    """What one rank finds: value and gradient of the loss for each split of the batch, after DDP's average."""
    x, y, splits = torch.load(f"{folder}/batch.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = DistributedDataParallel(model())
    found = []
    for split in splits:
        part = slice(0, split) if rank == 0 else slice(split, None)
        network.zero_grad()
        loss = binned_smooth_ece(network(x[part]), y[part])
        loss.backward()
        found.append((float(loss.detach()), gradients(network)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one_on_both_batches(tmp_path):
    """Also where one batch is larger, down to none on the second rank."""
    generator = torch.Generator().manual_seed(5)
    x = 3 * torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (40,), generator=generator)
    torch.save((x, y, [20, 33, 40]), tmp_path / "batch.pt")
    processes.succeed(tmp_path, ranks=2, function="tests.training.test_smooth_ece_ranks:two_ranks")
    network = model()
    loss = binned_smooth_ece(network(x), y)
    loss.backward()
    expected = gradients(network)
    assert expected.abs().max() > 1e-3
    for rank in (0, 1):
        for value, gradient in torch.load(tmp_path / f"{rank}.pt"):
            assert value == pytest.approx(float(loss.detach()), rel=1e-12)
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
    network.zero_grad()
    (0.5 * (binned_smooth_ece(network(x[:20]), y[:20]) + binned_smooth_ece(network(x[20:]), y[20:]))).backward()
    assert (gradients(network) - expected).abs().max() > 1e-3  # the mean of each rank's own loss is another one
