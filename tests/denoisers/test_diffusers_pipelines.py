"""Tiny random pipelines of diffusers, saved and read again, step by step against diffusers' own."""

import json
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from calib_guidance import from_diffusers
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ClassifierFreeGuidance, Combination, DiffusersDenoiser, ModuleDenoiser
from calib_guidance.diffusion import SampleStreams
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, FlowODE, FlowSDE, Heun, UniPC

transformers = pytest.importorskip("transformers")
PROMPTS = ["a photo of a cat", "two dogs"]


class Replay:
    """Noise that was drawn before."""

    def __init__(self, *tensors):
        self.tensors = iter(tensors)

    def __call__(self):
        return next(self.tensors).float()


def recorded(pipeline, **options):
    """Every state of a pipeline's run, and what it returns."""
    states, step = [], pipeline.scheduler.step

    def kept(*args, **kwargs):
        out = step(*args, **kwargs)
        states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipeline.scheduler.step = kept
    pipeline.set_progress_bar_config(disable=True)
    try:
        return states, pipeline(**options)
    finally:
        del pipeline.scheduler.step


def sampled(sampler, denoiser, y, *noise):
    """Every state of a sampler's run, and its result."""
    states = []
    images = sampler(denoiser, Replay(*noise), y, None, [lambda record: states.append(record.x_next)])
    return states, images


def assert_states(found, expected, scales=None):
    assert len(found) == len(expected)
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        scale = 1 if scales is None else scales[k]
        torch.testing.assert_close((scale * ours).float(), theirs[: len(ours)].float(), atol=2e-4, rtol=2e-4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae(**options):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tokenizer of letters, and two text encoders."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(2)
    sizes = {"vocab_size": len(tokens), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": 8}
    config = transformers.CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return tokenizer, transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)


def unet(**options):
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    ).eval()


def stable_diffusion(text, scheduler):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae(), text[1], text[0], unet(cross_attention_dim=8), scheduler, None, None, requires_safety_checker=False
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
SCHEDULERS = {
    "epsilon": (DDIMScheduler(**BETAS, **LATENT), DDIM("ddim4+1")),
    "v": (DDIMScheduler(**BETAS, **LATENT, prediction_type="v_prediction"), DDIM("ddim4+1")),
    "sample": (DDIMScheduler(**BETAS, **LATENT, prediction_type="sample"), DDIM("ddim4+1")),
    "zero_snr": (
        DDIMScheduler(
            **BETAS,
            **LATENT,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        DDIM("trailing4"),
    ),
    "dpm_solver": (
        DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1),
        DPMSolver("trailing4", spacing="timesteps"),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_with_prompts(text, tmp_path, name):
    """Read from its folder, prompts through its own text encoder, under classifier-free guidance."""
    scheduler, sampler = SCHEDULERS[name]
    pipeline = stable_diffusion(text, scheduler)
    pipeline.save_pretrained(tmp_path)
    x, y = normal(2, 4, 8, 8), torch.tensor([1, 0])
    options = {"latents": x, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    expected, _ = recorded(pipeline, prompt=[PROMPTS[k] for k in y], **options)
    denoiser = DiffusersDenoiser(str(tmp_path), prompts=PROMPTS)
    assert (denoiser.num_classes, denoiser.clip, denoiser.image_shape) == (2, False, (4, 8, 8))
    states, latents = sampled(sampler, Combination(denoiser, ClassifierFreeGuidance(3.0)), y, x)
    assert_states(states, expected)
    with torch.no_grad():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(denoiser.decode(latents), images, atol=1e-5, rtol=1e-5)
    if name == "epsilon":  # a prompt other than the sample's is another sample
        other = sampled(sampler, Combination(denoiser, ClassifierFreeGuidance(3.0)), 1 - y, x)[1]
        assert (other - latents).abs().max() > 1e-3


def test_negative_prompts_and_pipelines_at_hand(text):
    pipeline = stable_diffusion(text, SCHEDULERS["epsilon"][0])
    x, y = normal(2, 4, 8, 8), torch.tensor([0, 1])
    options = {"latents": x, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    expected, _ = recorded(pipeline, prompt=PROMPTS, negative_prompt=["blur"] * 2, **options)
    denoiser = from_diffusers(pipeline, prompts=PROMPTS, negative_prompt="blur")
    assert_states(sampled(DDIM("ddim4+1"), Combination(denoiser, ClassifierFreeGuidance(2.0)), y, x)[0], expected)


def test_stable_diffusion_xl(text, tmp_path):
    """Two text encoders, pooled embeddings, sizes as conditions, and zeros in place of an empty prompt."""
    from diffusers import StableDiffusionXLPipeline

    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    parts = (vae(scaling_factor=0.13), text[1], text[2], text[0], text[0], unet(cross_attention_dim=16, **xl))
    pipeline = StableDiffusionXLPipeline(*parts, SCHEDULERS["epsilon"][0], add_watermarker=False)
    pipeline.save_pretrained(tmp_path)
    x, y = normal(2, 4, 8, 8), torch.tensor([0, 1])
    options = {"latents": x, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    expected, _ = recorded(pipeline, prompt=PROMPTS, **options)
    denoiser = DiffusersDenoiser(str(tmp_path), prompts=PROMPTS)
    states, latents = sampled(DDIM("ddim4+1"), Combination(denoiser, ClassifierFreeGuidance(3.0)), y, x)
    assert_states(states, expected)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode(latents), pipeline.vae.decode(latents / 0.13).sample)


def test_stable_diffusion_3_is_a_flow(tmp_path):
    """Encoded conditions in place of prompts; scale and shift of the latents; the Euler steps of a shifted grid."""
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(4)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 16}
    model = SD3Transformer2DModel(**sizes, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8).eval()
    decoder = vae(scaling_factor=1.5, shift_factor=0.06)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(model, scheduler, decoder, *[None] * 6)
    x, y, tokens, pooled = normal(2, 4, 8, 8), torch.tensor([1, 0]), normal(3, 5, 8), normal(3, 8, seed=1)
    options = {"latents": x, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 4.0, "output_type": "latent"}
    options |= {"prompt_embeds": tokens[y], "negative_prompt_embeds": tokens[[2, 2]]}
    options |= {"pooled_prompt_embeds": pooled[y], "negative_pooled_prompt_embeds": pooled[[2, 2]]}
    expected, _ = recorded(pipeline, num_inference_steps=4, **options)
    conditions = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
    denoiser = DiffusersDenoiser(pipeline, prompts=conditions)
    sampler = FlowODE(4, shift=3.0)
    tau = sampler.grid(denoiser)[::-1][1:]
    states, latents = sampled(sampler, Combination(denoiser, ClassifierFreeGuidance(4.0)), y, x)
    assert_states(states, expected, [*torch.hypot(torch.tensor(1 - tau[:-1]), torch.tensor(tau[:-1])).tolist(), 1.0])
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode(latents), decoder.decode(latents / 1.5 + 0.06).sample)
    # The same network is a flow under every other sampler, from pure noise on.
    for other in (FlowSDE(3), DDIM("3"), DPMSolver(3), Heun(3), UniPC(3)):
        assert sampled(other, denoiser, y, *normal(8, 2, 4, 8, 8))[1].isfinite().all()


def flux(text, **options):
    from diffusers import FluxPipeline

    torch.manual_seed(9)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
    }
    model = FluxTransformer2DModel(**sizes | {"guidance_embeds": True} | options).eval()
    config = {"vocab_size": len(text[0]), "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**config)).eval()
    decoder = vae(scaling_factor=1.5, shift_factor=0.06)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), decoder, text[1], text[0], encoder, text[0], model)


@pytest.mark.parametrize("is_distilled", [True, False])
def test_flux_packs_its_latents(text, is_distilled):
    """Prompts through both encoders, the distilled guidance, and the classifier-free guidance of its negative prompt."""
    from diffusers import FluxPipeline

    pipeline = flux(text, guidance_embeds=is_distilled)
    x, y = normal(2, 4, 8, 8), torch.tensor([1, 0])
    options = {"latents": FluxPipeline._pack_latents(x, 2, 4, 8, 8), "height": 16, "width": 16, "output_type": "latent"}
    options |= {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 2.5}
    options |= {"true_cfg_scale": 3.0, "negative_prompt": ["blur"] * 2}
    packed, _ = recorded(pipeline, prompt=[PROMPTS[k] for k in y], **options)
    expected = [FluxPipeline._unpack_latents(state, 16, 16, 2) for state in packed]
    given = {"prompts": PROMPTS, "negative_prompt": "blur", "sample_size": 8}
    denoiser = DiffusersDenoiser(pipeline, **given, distilled_guidance=2.5)
    assert (denoiser.num_classes, denoiser.clip, denoiser.image_shape) == (2, False, (4, 8, 8))
    sampler = FlowODE(4, shift=3.0)
    tau = sampler.grid(denoiser)[::-1][1:]
    states, latents = sampled(sampler, Combination(denoiser, ClassifierFreeGuidance(3.0)), y, x)
    assert_states(states, expected, [*torch.hypot(torch.tensor(1 - tau[:-1]), torch.tensor(tau[:-1])).tolist(), 1.0])
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode(latents), pipeline.vae.decode(latents / 1.5 + 0.06).sample)
    other = sampled(sampler, DiffusersDenoiser(pipeline, **given, distilled_guidance=9.0), y, x)[1]
    same = sampled(sampler, denoiser, y, x)[1]
    assert ((other - same).abs().max() > 1e-3) == is_distilled


def test_dit_with_class_labels(tmp_path):
    """Saved and read; the class after the last is none; the learned variance is not part of ε."""
    from diffusers import DiTPipeline

    torch.manual_seed(5)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    pipeline = DiTPipeline(model, vae(), DDIMScheduler(**LATENT))
    pipeline.save_pretrained(tmp_path)
    y, x = torch.tensor([7, 901]), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    options = {"class_labels": y.tolist(), "guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "pt"}
    expected, out = recorded(pipeline, generator=torch.Generator().manual_seed(6), **options)
    denoiser = DiffusersDenoiser(str(tmp_path))
    assert (denoiser.num_classes, denoiser.null_label, denoiser.has_learned_variance) == (1000, 1000, True)
    states, latents = sampled(DDIM("ddim4+1"), Combination(denoiser, ClassifierFreeGuidance(2.0)), y, x)
    assert_states(states, expected)
    images = (denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
    theirs = torch.as_tensor(out.images)
    torch.testing.assert_close(
        images.permute(0, 2, 3, 1) if theirs.shape[-1] == 3 else images, theirs, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_pipelines_of_pixels(tmp_path, kind):
    from diffusers import DDIMPipeline, DDPMPipeline

    torch.manual_seed(7)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, **blocks).eval()
    scheduler = DDPMScheduler(variance_type="fixed_small") if kind == "ddpm" else DDIMScheduler()
    pipeline = (DDPMPipeline if kind == "ddpm" else DDIMPipeline)(model, scheduler)
    pipeline.save_pretrained(tmp_path)
    options = {} if kind == "ddpm" else {"use_clipped_model_output": True, "eta": 0.0}
    generator = torch.Generator().manual_seed(8)
    expected, _ = recorded(
        pipeline, batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **options
    )
    generator = torch.Generator().manual_seed(8)
    noise = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(4)]
    sampler = DDPM("ddim4", variance="fixed_small") if kind == "ddpm" else DDIM("ddim4")
    assert_states(sampled(sampler, DiffusersDenoiser(str(tmp_path)), None, *noise)[0], expected)


def test_a_classifier_guides_latents_through_the_decoder(text):
    """The gradient is that of the decoded image, under every sampler."""

    class Brightness(nn.Module):
        def forward(self, images):
            m = images.mean((1, 2, 3))
            return torch.stack([-m, m], 1)

    denoiser = DiffusersDenoiser(stable_diffusion(text, SCHEDULERS["v"][0]), prompts=PROMPTS)
    guidance = ClassifierGuidance(OffTheShelfClassifier(Brightness(), num_classes=2, normalize="none"), scale=20.0)
    x, y = normal(2, 4, 8, 8), torch.tensor([0, 1])
    guided = guidance(denoiser, x, 400, y)
    x0 = denoiser(x, 400, y).x0.requires_grad_()
    m = denoiser.vae(x0).mean((1, 2, 3))
    (gradient,) = torch.autograd.grad(torch.nn.functional.logsigmoid(2 * m * torch.tensor([-1, 1])).sum(), x0)
    torch.testing.assert_close(guided.score, 20 * gradient, atol=1e-6, rtol=1e-4)
    for sampler in (DDIM("ddim2+1"), DDPM("2"), DPMSolver(2), UniPC(2), Heun(2), FlowODE(2)):
        plain, found = (
            sampler(denoiser, SampleStreams([0, 0], range(2), denoiser.image_shape), y, each)
            for each in (None, guidance)
        )
        assert found.isfinite().all()
        assert (found - plain).abs().max() > 1e-4, type(sampler).__name__


def test_errors_name_cause_and_cure(text, tmp_path, monkeypatch):
    scheduler = SCHEDULERS["epsilon"][0]
    pipeline = stable_diffusion(text, scheduler)
    with pytest.raises(ConfigurationError, match="UNet2DConditionModel needs prompts: a list with a prompt per class"):
        DiffusersDenoiser(pipeline)
    with pytest.raises(ConfigurationError, match="expected a list with a prompt per class, got 'a cat'"):
        DiffusersDenoiser(pipeline, prompts="a cat")
    with pytest.raises(ConfigurationError, match="takes encoder_hidden_states, of equal length, got text"):
        DiffusersDenoiser(pipeline, prompts={"text": normal(2, 5, 8)})
    with pytest.raises(ConfigurationError, match="takes encoded conditions, encoder_hidden_states"):
        DiffusersDenoiser(pipeline.unet, scheduler, prompts=PROMPTS)
    with pytest.raises(ValueError, match="ends in pure noise"):
        ModuleDenoiser(nn.Identity(), (3, 8, 8), [0.1, 0.5, 1.0])
    with pytest.raises(ValueError, match="AutoencoderKL"):
        DiffusersDenoiser(pipeline.vae, scheduler)
    with pytest.raises(ConfigurationError, match="reads 32 channels and predicts 16: the others are images"):
        DiffusersDenoiser(flux(text, in_channels=32, out_channels=16), prompts=PROMPTS)
    with pytest.raises(ConfigurationError, match="sample_size of a Flux model must be even, got 7"):
        DiffusersDenoiser(flux(text), prompts=PROMPTS, sample_size=7)
    pipeline.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="found AutoencoderKL, expected one of UNet2DModel"):
        DiffusersDenoiser(str(tmp_path / "vae"), scheduler)
    pipeline.save_pretrained(tmp_path / "all")
    index = tmp_path / "all" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["os", "system"]}))
    with pytest.raises(CheckpointError, match="its text encoders are of os, which is not run"):
        DiffusersDenoiser(str(tmp_path / "all"), prompts=PROMPTS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'calib-guidance\[text\]'"):
        DiffusersDenoiser(str(tmp_path / "all"), prompts=PROMPTS)
