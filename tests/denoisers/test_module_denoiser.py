"""Networks of one's own, and diffusers models, as denoisers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn

from calib_guidance.denoisers import Combination, DiffusersDenoiser, ModuleDenoiser
from calib_guidance.diffusion import NoiseSchedule, SampleStreams
from calib_guidance.errors import CheckpointError
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, FlowODE


def unet(num_classes=None, out_channels=3):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=num_classes,
    )


class Given(nn.Module):
    """Returns what it was made with, and keeps what it is called with."""

    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, []

    def forward(self, x_t, *args):
        self.calls.append(args)
        return self.output


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_parameterization_gives_the_x0_that_the_output_stands_for(prediction):
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    denoiser = ModuleDenoiser(Given(None), (3, 8, 8), "cosine", prediction=prediction)
    abar = torch.tensor(denoiser.schedule.alphas_cumprod[600])
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    denoiser.network.output = {
        "epsilon": noise,
        "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0,
        "x0": x0,
    }[prediction].float()
    torch.testing.assert_close(denoiser(x_t.float(), 600).x0, x0.float(), atol=1e-5, rtol=1e-5)


def test_the_network_gets_long_steps_and_labels_and_its_null_label_for_minus_one():
    network = Given(torch.zeros(2, 3, 8, 8))
    denoiser = ModuleDenoiser(network, (3, 8, 8), num_classes=10, null_label=10)
    denoiser(torch.zeros(2, 3, 8, 8), 7, torch.tensor([3, -1]))
    t, y = network.calls[-1]
    assert t.dtype == torch.long
    assert t.tolist() == [7, 7]
    assert y.tolist() == [3, 10]
    # A grid of σ goes between steps.
    denoiser.prepare(denoiser.schedule.at_sigmas([0.5]), torch.tensor([1, 2]))(torch.zeros(2, 3, 8, 8), 0)
    t, _ = network.calls[-1]
    assert t.dtype == torch.float32
    assert not t[0].item().is_integer()


def test_each_sample_at_a_step_of_its_own_equals_the_samples_at_that_step():
    denoiser, x, y = (
        DiffusersDenoiser(unet(num_classes=5), DDPMScheduler()),
        torch.randn(3, 3, 8, 8),
        torch.tensor([0, 4, 2]),
    )
    together = denoiser(x, torch.tensor([10, 400, 700]), y).x0
    for n, t in enumerate([10, 400, 700]):
        torch.testing.assert_close(together[n], denoiser(x, t, y).x0[n], atol=1e-5, rtol=1e-5)


def test_without_null_label_a_missing_label_is_refused_before_sampling():
    denoiser = ModuleDenoiser(Given(None), (3, 8, 8), num_classes=10)
    with pytest.raises(ValueError, match="null_label"):
        denoiser(torch.zeros(1, 3, 8, 8), 7, torch.tensor([-1]))


def test_learned_variance_is_the_second_half_between_0_and_1():
    denoiser = ModuleDenoiser(Given(torch.full((1, 6, 8, 8), 0.5)), (3, 8, 8), learned_variance=True)
    assert (denoiser(torch.zeros(1, 3, 8, 8), 3).variance == 0.75).all()


def test_zero_terminal_snr_starts_from_pure_noise():
    x, v = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = ModuleDenoiser(Given(v), (3, 8, 8), [0.1, 0.5, 1.0], prediction="v")
    assert denoiser.max_sigma == math.inf
    torch.testing.assert_close(denoiser(x, 2).x0, -v, atol=1e-5, rtol=0)  # √ᾱ·x − √(1−ᾱ)·v at ᾱ = 0
    for sampler in (DDIM("3"), DDPM("3"), DPMSolver("3", spacing="timesteps"), FlowODE(3)):
        noise = SampleStreams([0], range(1), (3, 8, 8))
        assert sampler(denoiser, noise, torch.zeros(1).long()).isfinite().all()


def test_a_flow_gets_its_own_coordinates():
    x0, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Given(noise - x0)
    denoiser = ModuleDenoiser(network, (3, 8, 8), prediction="flow")
    tau = 0.3
    levels = denoiser.schedule.at_sigmas([tau / (1 - tau)])
    x = (1 - tau) * x0 + tau * noise
    found = denoiser.prepare(levels, None)(x / math.hypot(tau, 1 - tau), 0).x0
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-5)
    (t,) = network.calls[-1]
    torch.testing.assert_close(t, torch.full((2,), 300.0))
    with pytest.raises(ValueError, match="prediction.*flow"):
        ModuleDenoiser(network, (3, 8, 8), prediction="velocity")


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [("linear", "epsilon"), ("scaled_linear", "v_prediction"), ("squaredcos_cap_v2", "sample")],
)
def test_ddim_equals_diffusers_own_pipeline(schedule, prediction_type):
    model, y = unet(num_classes=5), torch.tensor([0, 4])
    scheduler = DDIMScheduler(
        beta_schedule=schedule,
        prediction_type=prediction_type,
        clip_sample=True,
        timestep_spacing="leading",
        set_alpha_to_one=True,
    )
    denoiser = DiffusersDenoiser(model, scheduler)
    noise = SampleStreams([0, 0], range(2), denoiser.image_shape)
    x = SampleStreams([0, 0], range(2), denoiser.image_shape)()
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = model(x, t, class_labels=y).sample
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    ours = DDIM(steps="ddim10")(denoiser, noise, y)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_ddpm_posterior_equals_diffusers_one_step():
    model, scheduler = unet(), DDPMScheduler(variance_type="fixed_small", clip_sample=True)
    denoiser = DiffusersDenoiser(model, scheduler)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = scheduler.step(model(x, 500).sample, 500, x).pred_original_sample
    torch.testing.assert_close(denoiser(x, 500).x0.clamp(-1, 1), theirs, atol=1e-5, rtol=1e-5)


def test_a_pipelines_folder_and_the_models_own_are_read(tmp_path):
    from diffusers import DDPMPipeline

    model = unet()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)
    DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "model")
    x = torch.randn(1, 3, 8, 8)
    expected = DiffusersDenoiser(model, scheduler)(x, 30).x0
    read = DiffusersDenoiser(str(tmp_path / "pipeline"))
    assert len(read.schedule) == 50
    assert torch.equal(read(x, 30).x0, expected)
    assert torch.equal(DiffusersDenoiser(str(tmp_path / "model"), scheduler)(x, 30).x0, expected)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        DiffusersDenoiser(str(tmp_path / "model"))


def test_classifier_free_guidance_of_a_model_with_a_null_label():
    model = unet(num_classes=11)
    denoiser = DiffusersDenoiser(model, DDPMScheduler(), null_label=10)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([2, 7])
    cond, uncond = denoiser(x, 400, y).x0, denoiser(x, 400, torch.tensor([10, 10])).x0
    torch.testing.assert_close(
        Combination(denoiser)(x, 400, y).x0, uncond + Combination(denoiser).rule.weight * (cond - uncond)
    )


def test_the_schedule_is_diffusers_own():
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = DDPMScheduler(beta_schedule=name)
        ours = DiffusersDenoiser(unet(), scheduler).schedule
        assert isinstance(ours, NoiseSchedule)
        torch.testing.assert_close(
            torch.tensor(ours.alphas_cumprod).float(), scheduler.alphas_cumprod, atol=1e-6, rtol=1e-4
        )
    images = DDPM(steps="3")(DiffusersDenoiser(unet(), DDPMScheduler()), SampleStreams([0], range(1), (3, 8, 8)), None)
    assert images.shape == (1, 3, 8, 8)
