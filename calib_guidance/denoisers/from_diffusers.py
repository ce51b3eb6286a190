"""Models of the diffusers library."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.denoisers.decoders import DecoderDtype
from calib_guidance.denoisers.latents import DecodesLatents
from calib_guidance.denoisers.module import ModuleDenoiser
from calib_guidance.denoisers.prompts import encode_prompts, text_pipeline
from calib_guidance.errors import ConfigurationError, check_choice, check_installed
from calib_guidance.weights.diffusers_folder import find_model, has_part, load_model, scheduler_config

_PREDICTIONS: dict[str, Any] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
# Classes of models, and the part of a pipeline that they are.
_MODELS = {"UNet2DModel": "unet", "UNet2DConditionModel": "unet", "DiTTransformer2DModel": "transformer"}
_MODELS |= {"Transformer2DModel": "transformer", "SD3Transformer2DModel": "transformer"}
_MODELS |= {"FluxTransformer2DModel": "transformer"}
# Arguments of models that are encoded prompts.
_TEXT = {"UNet2DConditionModel": ["encoder_hidden_states"]}
_TEXT |= {f"{name}Transformer2DModel": ["encoder_hidden_states", "pooled_projections"] for name in ("SD3", "Flux")}
_FLUX_SIZE = 128  # side of its latents where nothing is said: 1024 pixels, as its pipeline's
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


class _Sample(nn.Module):
    """A diffusers model as ``network(x_t, t, y)``.

    ``conditions`` are arguments of the model by label, ``(K, …)`` each; ``time_ids`` those of Stable Diffusion XL.
    """

    model: Any
    time_ids: Tensor | None

    def __init__(self, model: nn.Module, conditions: Mapping[str, Tensor], time_ids: Tensor | None):
        super().__init__()
        self.model, self.names = model, list(conditions)
        for name, rows in conditions.items():
            self.register_buffer(name, rows, persistent=False)
        self.register_buffer("time_ids", time_ids, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if not self.names:
            given: dict[str, Any] = {} if y is None else {"class_labels": y}
        else:
            given = {name: getattr(self, name)[y].to(x_t.dtype) for name in self.names}
        if self.time_ids is not None:
            ids = self.time_ids.to(x_t.dtype).expand(len(x_t), -1)
            given["added_cond_kwargs"] = {"text_embeds": given.pop("text_embeds"), "time_ids": ids}
        return self.model(x_t, timestep=t, return_dict=False, **given)[0]


class _Flux(_Sample):
    """A Flux transformer: its tokens are 2×2 pixels of the latents, its t is in [0, 1]."""

    def __init__(self, model: nn.Module, conditions: Mapping[str, Tensor], guidance: float | None):
        super().__init__(model, conditions, None)
        self.guidance = guidance

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {name: getattr(self, name)[y].to(x_t.dtype) for name in self.names}
        patches = F.pixel_unshuffle(x_t, 2)
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (1, *patches.shape[-2:])), indexing="ij"), -1)
        given["img_ids"] = places.flatten(0, 2).to(x_t)
        given["txt_ids"] = x_t.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        if self.guidance is not None:
            given["guidance"] = torch.full((len(x_t),), self.guidance, device=x_t.device)
        tokens = patches.flatten(2).transpose(1, 2)
        output = self.model(tokens, timestep=t.float() / 1000, return_dict=False, **given)[0]
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, patches.shape[-2:]), 2)


class DiffusersDenoiser(DecodesLatents, ModuleDenoiser):
    """A model of diffusers with the noise schedule of its scheduler, and with the text encoders and autoencoder of its pipeline.

    ::

        denoiser = DiffusersDenoiser("hf://google/ddpm-cifar10-32")
        denoiser = DiffusersDenoiser("hf://stabilityai/stable-diffusion-2-1", prompts=["a photo of a cat", "a photo of a dog"])

    Its scheduler's configuration says β, T, whether it ends in pure noise, and what is predicted: ε, v, x0 or a flow. Labels are
    those of the model's classes. With prompts they are 0 … K − 1, and -1 is the negative prompt: ``Combination`` then equals
    the pipeline's classifier-free guidance. Samples of latent models are latents, which ``decode`` makes images of.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel``, ``SD3Transformer2DModel`` or
            ``FluxTransformer2DModel``; a pipeline with one; its folder, that of its pipeline, or ``hf://OWNER/NAME[@REVISION]``.
        scheduler: a diffusers scheduler or its configuration; None takes the pipeline's.
        null_label: label that the model was trained with for "no class"; None where there is none, and of a DiT the one after its
            classes.
        prompts: of a text-to-image model, a prompt per class; needs transformers (``pip install 'calib-guidance[text]'``). Or the
            encoded conditions by the names of the model's arguments (``encoder_hidden_states``, ``text_embeds``,
            ``pooled_projections``), ``(K + 1, …)`` each, the last row for -1.
        negative_prompt: the prompt of label -1; None is that of the pipeline without one.
        sample_size: side of x_t, of latents where it is a latent model; None takes the model's.
        vae: as for :class:`~calib_guidance.denoisers.decoders.VAEDecoder`; None takes the pipeline's, with its scale and shift.
        decode_batch, vae_dtype: see :class:`~calib_guidance.denoisers.dit.DiTDenoiser`.
        distilled_guidance: guidance scale that a guidance-distilled Flux is told; that of its pipeline is 3.5.
        options: ``compile`` and ``dtype`` of :class:`ModuleDenoiser`.

    Examples:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
        >>> denoiser = DiffusersDenoiser(UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks), DDPMScheduler())
        >>> denoiser.image_shape, denoiser.num_classes, denoiser.prediction, len(denoiser.schedule)
        ((1, 8, 8), None, 'epsilon', 1000)
    """

    def __init__(
        self,
        model: nn.Module | str | Any,
        scheduler: Any | dict[str, Any] | None = None,
        null_label: int | None = None,
        prompts: Sequence[str] | Mapping[str, Tensor] | None = None,
        negative_prompt: str | None = None,
        sample_size: int | None = None,
        vae: nn.Module | str | None = None,
        decode_batch: int | None = 4,
        vae_dtype: DecoderDtype | None = None,
        distilled_guidance: float = 3.5,
        **options: Any,
    ):
        network, scheduler, autoencoder, pipeline = _parts(model, scheduler, vae)
        kind, config = type(network).__name__, network.config
        is_flux = kind == "FluxTransformer2DModel"
        size = sample_size or config.get("sample_size", _FLUX_SIZE if is_flux else None)
        if size is None:
            raise ValueError("the model's configuration has no sample_size: set it to the side of its images in pixels")
        height, width = (size, size) if isinstance(size, int) else size
        betas, prediction, clip = process_of(scheduler)
        is_xl = config.get("addition_embed_type") == "text_time"
        names = _TEXT.get(kind, []) + ["text_embeds"] * is_xl
        conditions: Mapping[str, Tensor] = {}
        if names:
            conditions = _conditions(kind, prompts, negative_prompt, names, pipeline or model)
            classes, null_label = len(conditions[names[0]]) - 1, len(conditions[names[0]]) - 1
        elif prompts is not None:
            raise ConfigurationError(f"a {kind} has no text: give class labels instead of prompts")
        elif kind == "DiTTransformer2DModel":
            classes = config.num_embeds_ada_norm
            null_label = classes if null_label is None else null_label
        else:
            classes = config.num_class_embeds
        channels = config.in_channels
        if is_flux:
            if (config.out_channels or channels) != channels:
                raise ConfigurationError(
                    f"this Flux model reads {channels} channels and predicts {config.out_channels}: the others are images as "
                    "conditions, which are not supported; take a model of text to image"
                )
            if height % 2 or width % 2:
                raise ConfigurationError(f"sample_size of a Flux model must be even, got {size}")
            channels //= 4
        factor = 1 if autoencoder is None else 2 ** (len(autoencoder.config.block_out_channels) - 1)
        pixels = [height * factor, width * factor]
        sample: nn.Module = (
            _Flux(network, conditions, distilled_guidance if config.guidance_embeds else None)
            if is_flux
            else _Sample(network, conditions, torch.tensor([*pixels, 0, 0, *pixels]) if is_xl else None)
        )
        super().__init__(
            sample,
            (channels, height, width),
            noise_schedule=betas,
            prediction=prediction,
            num_classes=classes,
            null_label=null_label,
            learned_variance=getattr(config, "out_channels", None) == 2 * config.in_channels,
            clip=clip is not False and autoencoder is None and channels in (1, 3),
            **options,
        )
        self.is_latent = autoencoder is not None or channels not in (1, 3)
        latents = {} if autoencoder is None else latents_of(autoencoder)
        self.set_decoder(autoencoder, decode_batch, vae_dtype, **latents)

    def decode(self, x0: Tensor) -> Tensor:
        return self.decode_latents(x0) if self.is_latent else x0


def _parts(model: Any, scheduler: Any, vae: Any) -> tuple[Any, Any, Any, Any]:
    """Network, scheduler, autoencoder and, where it is at hand, the pipeline of a denoiser's arguments."""
    pipeline = model if hasattr(model, "components") else None
    if pipeline is not None:
        network = next(
            (pipeline.components.get(part) for part in ("unet", "transformer") if part in pipeline.components), None
        )
        check_choice("model", type(network).__name__, _MODELS)
        scheduler, vae = scheduler or pipeline.scheduler, vae or pipeline.components.get("vae")
    elif isinstance(model, str):
        network, scheduler = find_model(model, _MODELS), scheduler or scheduler_config(model)
        vae = model if vae is None and has_part(model, "vae") else vae
    else:
        network = model
        if type(network).__module__.startswith("diffusers."):
            check_choice("model", type(network).__name__, _MODELS)
    if scheduler is None:
        raise ValueError("a model without a pipeline's folder needs scheduler, such as DDPMScheduler(...)")
    return network, scheduler, load_model(vae, "AutoencoderKL", "vae") if isinstance(vae, str) else vae, pipeline


def process_of(scheduler: Any) -> tuple[Any, Any, bool | None]:
    """β or the name of a schedule, what is predicted, and whether x̂0 is clipped (None: not said), of a scheduler."""
    config = dict(getattr(scheduler, "config", scheduler))
    name = config.get("_class_name", type(scheduler).__name__)
    flow = name.startswith("FlowMatch")
    predicted = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    check_choice("prediction_type", predicted, _PREDICTIONS)
    if _PREDICTIONS[predicted] == "flow":
        return "linear", "flow", None
    check_installed("diffusers", "diffusers", "DiffusersDenoiser")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # seconds to import

    schedule: Any = DDPMScheduler(**{key: config[key] for key in _BETAS if key in config})
    return schedule.betas.double().tolist(), _PREDICTIONS[predicted], config.get("clip_sample")


def _conditions(
    kind: str, prompts: Any, negative_prompt: str | None, names: list[str], source: Any
) -> Mapping[str, Tensor]:
    """What the model is given for each prompt, and for none."""
    if prompts is None:
        raise ConfigurationError(f"a {kind} needs prompts: a list with a prompt per class")
    if not isinstance(prompts, Mapping):
        if isinstance(source, nn.Module):
            raise ConfigurationError(
                "prompts: a model without its pipeline takes encoded conditions, " + ", ".join(names)
            )
        pipeline = text_pipeline(source) if isinstance(source, str) else source
        return encode_prompts(pipeline, prompts, negative_prompt, names)
    if {*prompts} != {*names} or len({len(rows) for rows in prompts.values()}) != 1:
        raise ConfigurationError(
            f"prompts: a {kind} takes {' and '.join(names)}, of equal length, got {', '.join(prompts)}"
        )
    return prompts


def latents_of(vae: Any) -> dict[str, Any]:
    """Scale and mean of an autoencoder's latents, see :class:`~calib_guidance.denoisers.decoders.VAEDecoder`."""
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor")
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        return {"latent_scale": [scale / s for s in std], "latent_mean": mean}
    return {"latent_scale": scale, "latent_mean": None if shift is None else [shift]}
