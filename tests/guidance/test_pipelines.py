"""Guidance inside diffusers pipelines gives what the samplers here give."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import nn

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import DiffusersDenoiser
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, guide_pipeline, guided_scheduler
from calib_guidance.guidance.stabilizer import GradientStabilizer
from calib_guidance.samplers import DDIM, DPMSolver, FlowODE


class Halves(nn.Module):
    """Whether the upper half of an image is brighter than the lower."""

    def forward(self, images):
        upper, lower = images.chunk(2, dim=2)
        return torch.stack([upper.mean((1, 2, 3)), lower.mean((1, 2, 3))], 1) * 20


def model():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks).eval()


def guidance(scale=20.0, **options):
    return ClassifierGuidance(OffTheShelfClassifier(Halves(), num_classes=2, normalize="none"), scale=scale, **options)


Y = torch.tensor([0, 1, 1])
VP = {"clip_sample": False, "set_alpha_to_one": True}
CASES = {
    "ddim": (DDIMScheduler(**VP), DDIM("ddim5", clip_denoised=False)),
    "v": (DDIMScheduler(**VP, prediction_type="v_prediction"), DDIM("ddim5", clip_denoised=False)),
    "dpm_solver": (
        DPMSolverMultistepScheduler(timestep_spacing="trailing"),
        DPMSolver("trailing5", spacing="timesteps", clip_denoised=False),
    ),
    "sigma": (EulerDiscreteScheduler(timestep_spacing="trailing"), DDIM("trailing5", clip_denoised=False)),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=2.0), FlowODE(5, shift=2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_guided_scheduler_is_a_guided_sampler(name):
    """The interval and the moving average of gradients know the step too."""
    scheduler, sampler = CASES[name]
    network = model()
    options = {"schedule": GuidanceSchedule(sigma_interval=(0, 20.0)), "stabilizer": GradientStabilizer(ema=0.5)}
    denoiser = DiffusersDenoiser(network, scheduler)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = sampler(denoiser, lambda: x, Y, guidance(**options))
    plain = sampler(denoiser, lambda: x, Y)
    guided = guided_scheduler(scheduler, guidance(**options), Y)
    for _ in range(2):  # a second run starts from its own state
        if name == "flow":
            guided.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
        else:
            guided.set_timesteps(5)
        state = x * (float(guided.init_noise_sigma) if name == "sigma" else 1)
        if name == "sigma":  # diffusers starts from σ·ε in place of √(1 + σ²)·(√ᾱ·0 + √(1−ᾱ)·ε) + x0
            state = x * float((1 + guided.sigmas[0] ** 2).sqrt())
        for t in guided.timesteps:
            with torch.no_grad():
                output = network(guided.scale_model_input(state, t) if name == "sigma" else state, t).sample
            state = guided.step(output, t, state).prev_sample
        torch.testing.assert_close(state, expected, atol=1e-3, rtol=1e-3)
    assert (plain - expected).abs().max() > 0.02
    assert "step" not in vars(scheduler)
    assert inspect.signature(guided.step) == inspect.signature(scheduler.step)


def test_a_pipeline_is_guided_in_the_block_and_not_after_it():
    pipeline = DDIMPipeline(model(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    original = pipeline.scheduler

    def images():
        options = {"num_inference_steps": 5, "output_type": "np", "use_clipped_model_output": True}
        out = pipeline(batch_size=3, generator=torch.Generator().manual_seed(2), **options)
        return torch.as_tensor(out.images).permute(0, 3, 1, 2)

    plain = images()
    with guide_pipeline(pipeline, guidance(100.0), Y):
        guided = images()
    assert pipeline.scheduler is original
    assert torch.equal(images(), plain)
    classify = OffTheShelfClassifier(Halves(), num_classes=2, normalize="none")
    before, after = (classify(each * 2 - 1, None).log_softmax(1)[range(3), Y] for each in (plain, guided))
    assert (after > before + 0.01).all()


def test_a_learned_variance_is_left_alone():
    """Ancestral steps, with the variance of the network."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        out_channels=6,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    guided = guided_scheduler(scheduler, guidance(), Y)
    guided.set_timesteps(4)
    x, t = torch.randn(3, 3, 8, 8), guided.timesteps[1]
    guided.step(torch.zeros(3, 6, 8, 8), guided.timesteps[0], x)
    with torch.no_grad():
        output = network(x, t).sample
    found = guided.step(output, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
    scheduler.set_timesteps(4)
    plain = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
    denoiser = DiffusersDenoiser(network, scheduler)
    aux = guidance()(denoiser, x, int(t), Y)
    abar = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(found - plain, (1 - abar) / abar.sqrt() * aux.score, atol=1e-3, rtol=1e-3)


def test_what_a_scheduler_cannot_do_is_refused():
    for options in ({"backprop_through_denoiser": True}, {"apply_to": "cfg_residual"}):
        with pytest.raises(ValueError, match="guide with apply_to: score and without backprop_through_denoiser"):
            guided_scheduler(DDIMScheduler(), guidance(**options), Y)
