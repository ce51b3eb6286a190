"""ADM's networks as denoisers."""

import pytest
import torch
from torch import nn

from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.networks import UNet


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("class_conditional", [True, False])
def test_each_sample_at_a_step_of_its_own(prediction, class_conditional):
    """As the same samples at that step together, and as the network and the definition of its output say."""
    torch.manual_seed(0)
    network = UNet(4, 1, 32, 2, num_res_blocks=1, channel_mult=(1,), num_classes=3, use_scale_shift_norm=True)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    denoiser = ADMDenoiser(network, noise_schedule="cosine", prediction=prediction, class_conditional=class_conditional)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y, timesteps, i = torch.tensor([2, -1, 0, 1]), [10, 400, 700], torch.tensor([1, 2, 0, 1])
    with torch.no_grad():
        predict = denoiser.prepare(denoiser.schedule.at(timesteps), y)
        x0, fraction, *_ = predict(x, i)
        for n in range(len(x)):
            expected = predict(x, int(i[n]))
            torch.testing.assert_close(x0[n], expected.x0[n], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(fraction[n], expected.variance[n], atol=1e-5, rtol=1e-5)
        t = torch.tensor(timesteps)[i]
        output, variance = network(x, t, y if class_conditional else None).chunk(2, dim=1)
    abar = torch.tensor(denoiser.schedule.alphas_cumprod)[t].view(-1, 1, 1, 1)
    if prediction == "epsilon":
        direct = (x - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        direct = abar.sqrt() * x - (1 - abar).sqrt() * output
    torch.testing.assert_close(x0, direct.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fraction, (variance + 1) / 2, atol=1e-5, rtol=1e-5)
