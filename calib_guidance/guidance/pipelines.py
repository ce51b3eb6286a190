"""Classifier guidance of diffusers pipelines."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Prediction
from calib_guidance.denoisers.decoders import VAEDecoder
from calib_guidance.denoisers.from_diffusers import latents_of, process_of
from calib_guidance.denoisers.module import ModuleDenoiser
from calib_guidance.diffusion.parameterization import x0_coefficients
from calib_guidance.diffusion.paths import path_time
from calib_guidance.diffusion.schedules import PURE_NOISE, NoiseLevels
from calib_guidance.guidance.base import Decode, Guidance, identity


def guided_scheduler(scheduler: Any, guidance: Guidance, y: Tensor, decode: Decode = identity) -> Any:
    """A diffusers scheduler whose ``step`` adds guidance to the model's output; the original stays as it is.

    A pipeline shows x_t and the model's output together to its scheduler alone: ``callback_on_step_end`` gets the latents of
    the next step without x̂0, and a guider of a modular pipeline the predictions without x_t. Guidance here is what it
    is in the samplers of this package: x̂0 moves by (1−ᾱ)/√ᾱ·s·∇S, written back as ε, v or velocity.

    Args:
        scheduler: any of ε, v, x0 or flow prediction: of DDPM's coordinates, of σ (Euler, Heun), or of flow matching.
        guidance: with ``apply_to: score`` and without ``backprop_through_denoiser``, since the scheduler knows no network.
        y: ``(N,)`` classes of the pipeline's images.
        decode: from latents to the images that the classifier sees.
    """
    for part in guidance.parts():
        if part.apply_to != "score" or getattr(part, "backprop_through_denoiser", False):
            raise ValueError(
                "a scheduler sees x_t and the model's output, not the model: guide with apply_to: score and without "
                "backprop_through_denoiser"
            )
    betas, prediction, clip = process_of(scheduler)
    schedule = ModuleDenoiser(nn.Identity(), (1, 1, 1), betas, prediction=prediction).schedule
    guided, run = copy.copy(scheduler), SimpleNamespace(guide=None, done=0)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        type(scheduler).set_timesteps(guided, *args, **kwargs)
        run.guide, run.done = None, 0

    @functools.wraps(scheduler.step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if run.guide is None:
            labels = y.to(sample.device).repeat(len(sample) // len(y))
            run.levels = schedule.at_sigmas(_sigmas(guided, prediction)[::-1])
            run.guide = guidance.prepare(run.levels, labels, decode)
            run.to_vp, run.a, run.b = _coordinates(guided, prediction, run.levels)
        i, channels = len(run.levels.times) - 1 - run.done, sample.shape[1]
        output = model_output[:, :channels].float()
        x_t = run.to_vp[i] * sample.float()
        x0 = run.a[i] * x_t + run.b[i] * output
        found = run.guide(lambda x, i: Prediction(x0.clamp(-1, 1) if clip else x0), x_t, i)
        if found.score is not None and run.levels.sigmas[i] < PURE_NOISE / 2:
            abar = float(run.levels.alphas_cumprod[i])
            shift = (1 - abar) / abar**0.5 * found.score
            output = (output + shift / run.b[i]).to(model_output.dtype)
            model_output = torch.cat([output, model_output[:, channels:]], dim=1)
        run.done += 1
        return type(scheduler).step(guided, model_output, timestep, sample, *args, **kwargs)

    guided.set_timesteps, guided.step = set_timesteps, step
    return guided


@contextlib.contextmanager
def guide_pipeline(pipeline: Any, guidance: Guidance, y: Tensor, decode_batch: int = 4) -> Iterator[Any]:
    """Classifier guidance of every call of a diffusers pipeline in the block; see :func:`guided_scheduler`.

    ::

        with guide_pipeline(pipeline, ClassifierGuidance(classifier, scale=2.0), torch.tensor([3, 7])):
            images = pipeline(["a cat", "a dog"], num_inference_steps=25).images

    Args:
        pipeline: its images are decoded by its autoencoder, where it has one, for the classifier.
        guidance, y: see :func:`guided_scheduler`.
        decode_batch: latents that are decoded at a time.
    """
    scheduler, vae = pipeline.scheduler, getattr(pipeline, "vae", None)
    decode = identity if vae is None else _decoder(vae, decode_batch)
    pipeline.scheduler = guided_scheduler(scheduler, guidance, y, decode)
    try:
        yield pipeline
    finally:
        pipeline.scheduler = scheduler


def _decoder(vae: nn.Module, decode_batch: int) -> Decode:
    """Images of a pipeline's latents, whose autoencoder stays as it is."""
    decoder = VAEDecoder(copy.deepcopy(vae), **latents_of(vae)).eval().requires_grad_(False)
    return lambda x0: torch.cat([decoder(part) for part in x0.split(decode_batch)])


def _sigmas(scheduler: Any, prediction: str) -> np.ndarray:
    """σ = √(1/ᾱ − 1) of every step, in the order of the steps."""
    steps, own = scheduler.timesteps.cpu(), getattr(scheduler, "sigmas", None)
    if own is not None and len(own) == len(steps) + 1:
        own = own[:-1].double().cpu().numpy()
        with np.errstate(divide="ignore"):
            sigmas = own / (1 - own) if prediction == "flow" else own
    else:
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt(1 / scheduler.alphas_cumprod.double().cpu()[steps.long()].numpy() - 1)
    return np.minimum(sigmas, PURE_NOISE)


def _coordinates(scheduler: Any, prediction: str, levels: NoiseLevels) -> tuple[list[float], list[float], list[float]]:
    """By level: what makes x_t of a scheduler's sample, and a and b of x̂0 = a·x_t + b·output."""
    if prediction == "flow":
        tau = path_time("linear", levels.alphas_cumprod)
        scale = np.hypot(tau, 1 - tau)
        return (1 / scale).tolist(), scale.tolist(), (-tau).tolist()
    a, b = x0_coefficients(prediction, levels.alphas_cumprod)
    probe = copy.copy(scheduler).scale_model_input(torch.ones(1), scheduler.timesteps[0])
    of_sigma = not torch.equal(probe, torch.ones(1))  # its samples are x0 + σ·ε
    to_vp = np.sqrt(levels.alphas_cumprod) if of_sigma else np.ones_like(levels.alphas_cumprod)
    return to_vp.tolist(), a.tolist(), b.tolist()
