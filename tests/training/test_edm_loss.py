"""EDM2's training: its loss against closed forms, its schedules, and the way to a denoiser and back."""

import numpy as np
import pytest
import torch
from scipy.stats import lognorm
from torch import nn

from calib_guidance.callbacks import PostHocEMA
from calib_guidance.denoisers import EDM2Denoiser
from calib_guidance.networks import EDM2UNet, UNet
from calib_guidance.tasks import TrainDiffusion
from calib_guidance.training import EDMLoss, FlowMatching, InverseSqrt
from calib_guidance.weights.io import save_weights

SIGMAS = torch.tensor([0.02, 0.3, 1.0, 5.0, 60.0])


class Linear(nn.Module):
    """F = a·input + u, and the uncertainty u(σ) = b + c·ln σ/4."""

    in_channels = out_channels = 1

    def __init__(self, a=0.0, b=0.0, c=0.0):
        super().__init__()
        self.a, self.b, self.c, self.calls = a, b, c, []

    def forward(self, x, c_noise, y):
        self.calls.append((x, c_noise, y))
        return self.a * x

    def logvar(self, c_noise):
        return (self.b + self.c * c_noise).view(-1, 1, 1, 1)


def test_a_gaussian_law_has_loss_one_at_every_sigma_where_the_network_is_zero():
    """λ·E‖c_skip·x − x0‖² = 1 for x0 ~ N(0, σ_d²): what the weighting is for."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(SIGMAS), 1, 200, 200, generator=generator)
    for data in (0.5, 0.85):
        loss = EDMLoss(sigma_data=data, uncertainty=False)(Linear(), data * x0, None, SIGMAS, noise)
        torch.testing.assert_close(loss, torch.ones(len(SIGMAS)), atol=0.03, rtol=0)


def test_the_loss_is_its_formula():
    x0, noise = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    sigma, data, network = SIGMAS.double(), 0.7, Linear(0.3, 0.2, -1.0)
    found = EDMLoss(sigma_data=data)(network, x0, torch.arange(5), sigma, noise)
    for n, s in enumerate(sigma.tolist()):
        x = (x0[n] + s * noise[n]).numpy()
        denoised = data**2 / (s**2 + data**2) * x
        denoised += s * data / np.sqrt(s**2 + data**2) * (0.3 * x / np.sqrt(s**2 + data**2))
        u = 0.2 - np.log(s) / 4
        error = np.mean((denoised - x0[n].numpy()) ** 2) * (s**2 + data**2) / (s * data) ** 2
        assert float(found[n]) == pytest.approx(error / np.exp(u) + u, rel=1e-9)
    x, c_noise, y = network.calls[0]
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_uncertainty_is_least_at_the_logarithm_of_the_error():
    x0, noise = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    plain = EDMLoss(uncertainty=False)(Linear(0.4), x0, None, SIGMAS.double(), noise)
    b = plain[2].log().requires_grad_()
    EDMLoss()(Linear(0.4, b), x0, None, SIGMAS.double(), noise)[2].backward()
    assert abs(float(b.grad)) < 1e-12
    assert float(EDMLoss()(Linear(0.4, b), x0, None, SIGMAS.double(), noise)[2]) == pytest.approx(1 + float(b))


def test_sigma_is_log_normal_and_never_zero():
    objective = EDMLoss(mean=-0.4, std=1.3)
    u = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)
    expected = lognorm.ppf(u.numpy(), 1.3, scale=np.exp(-0.4))
    np.testing.assert_allclose(objective.quantile(u).numpy(), expected, rtol=1e-9)
    assert torch.isfinite(objective.quantile(torch.tensor([0.0, 1.0])).log()).all()


def test_networks_that_cannot_be_trained_so_are_refused():
    unet = {"image_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
    unet |= {"attention_resolutions": []}
    with pytest.raises(ValueError, match=r"set out_channels to in_channels \(1\), got 2"):
        TrainDiffusion(UNet(**unet, out_channels=2), objective=EDMLoss())
    with pytest.raises(ValueError, match="set uncertainty to false, or take EDM2UNet"):
        TrainDiffusion(UNet(**unet, out_channels=1), objective=EDMLoss())
    with pytest.raises(ValueError, match=r"out_channels must be in_channels \(1\), got 3"):
        TrainDiffusion(UNet(**unet, out_channels=3), objective=FlowMatching())


def test_rates_rise_stay_and_fall_with_the_root():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule, rates = InverseSqrt(optimizer, warmup_steps=3, constant_steps=10), []
    for _ in range(41):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5])
    assert rates[3:11] == [0.5] * 8
    np.testing.assert_allclose([rates[20], rates[40]], [0.5 / np.sqrt(2), 0.25])
    with pytest.raises(ValueError, match="constant_steps at least 1, got 0"):
        InverseSqrt(optimizer, constant_steps=0)


def test_a_trained_network_is_what_the_denoiser_runs(tmp_path):
    """A step normalizes the weights; the denoiser's x̂0 gives the loss of the network again."""
    torch.manual_seed(0)
    network = EDM2UNet(8, 1, 3, 16, (1, 2), 1, (4,), channels_per_head=32, logvar_channels=8)
    objective = EDMLoss(0.0, 1.2, 0.85)
    task = TrainDiffusion(network, objective=objective, label_dropout=0.5)
    assert task.weights_metadata == {"sigma_data": 0.85}
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    x0, y, noise = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, -1, 1]), torch.randn(4, 1, 8, 8)
    sigma = torch.tensor([0.1, 0.7, 2.0, 9.0])
    before = objective(network.eval(), x0, y, sigma, noise).mean()
    network.train()
    for _ in range(6):
        loss = task.loss(x0, y, sigma, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective(network, x0, y, sigma, noise).mean() < before - 0.1
    for name, value in network.named_parameters():
        if value.ndim > 1:
            torch.testing.assert_close(
                value.flatten(1).square().mean(1), torch.ones(len(value)), atol=1e-3, rtol=0, msg=name
            )
    expected = objective(network.eval(), x0, y, sigma, noise)
    save_weights(network, tmp_path / "w.safetensors", **task.weights_metadata)
    same = EDM2UNet(8, 1, 3, 16, (1, 2), 1, (4,), channels_per_head=32, logvar_channels=8)
    denoiser = EDM2Denoiser(same, str(tmp_path / "w.safetensors"), sigma_data=0.85)
    levels = denoiser.schedule.at_sigmas(sigma.numpy())
    x_t = (x0 + sigma.view(-1, 1, 1, 1) * noise) / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    denoised = denoiser.prepare(levels, y)(x_t, torch.arange(4)).x0
    error = (denoised - x0).square().flatten(1).mean(1) * (sigma**2 + 0.85**2) / (sigma * 0.85) ** 2
    u = network.logvar(sigma.log() / 4).flatten()
    torch.testing.assert_close(error / u.exp() + u, expected, atol=1e-4, rtol=1e-4)


def test_two_sets_of_averages_have_states_of_their_own():
    first, second = PostHocEMA(), PostHocEMA(stds=[0.15], folder="direct")
    assert first.state_key != second.state_key
