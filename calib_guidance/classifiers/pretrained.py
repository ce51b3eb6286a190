"""Published models by name."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from calib_guidance.backend.shipped import find_file
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier
from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    EDM2Denoiser,
    EDMDenoiser,
    FlowDenoiser,
    RAEDecoder,
    TinyDecoder,
    UnconditionalModel,
    VAEDecoder,
)
from calib_guidance.errors import CheckpointError
from calib_guidance.networks import EDM2UNet, PatchUNet, SmallResNet, UNet
from calib_guidance.weights import registry
from calib_guidance.weights.hub import PREFIX

_BY_NAME = {"adm": ADMDenoiser, "edm": EDMDenoiser, "dit": DiTDenoiser, "flow": FlowDenoiser}
_BY_NAME["edm2"] = EDM2Denoiser
_VAES = {"dit": "sd_vae_ft_ema", "flow": "sd_vae_ft_ema", "edm2": "sd_vae_ft_mse"}
# EDM2 under its published guidance, by FID: training and average of the model, those of the guiding one, and the weight.
_GUIDED = {
    "edm2_img64_s_autoguided": ("1073741-0.045", "edm2_img64_xs", "0134217-0.110", 1.7),
    "edm2_img512_s_autoguided": ("2147483-0.070", "edm2_img512_xs", "0134217-0.125", 2.1),
    "edm2_img512_xxl_autoguided": ("0939524-0.075", "edm2_img512_m", "0268435-0.155", 2.05),
    "edm2_img512_s_guided": ("2147483-0.025", "edm2_img512_xs_uncond", "2147483-0.025", 1.4),
    "edm2_img512_xxl_guided": ("0939524-0.015", "edm2_img512_xs_uncond", "2147483-0.015", 1.2),
}
_BY_NAME |= {"adm_classifier": NoiseAwareClassifier}


def _shipped(name: str, folder: str = "digits") -> str:
    return str(find_file(f"checkpoints/{folder}/{name}.safetensors"))


def _digits_unet(out_channels: int, width: int = 32) -> UNet:
    return UNet(
        image_size=8,
        in_channels=1,
        model_channels=width,
        out_channels=out_channels,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=10,
        num_head_channels=width,
        use_scale_shift_norm=True,
        resblock_updown=True,
        min_group_channels=None if width == 32 else 4,
    )


def _digits(file: str = "diffusion", width: int = 32, **options: Any) -> ADMDenoiser:
    return ADMDenoiser(
        _digits_unet(2, width), _shipped(file), **{"noise_schedule": "cosine", "prediction": "v"} | options
    )


def _digits_flow(**options: Any) -> FlowDenoiser:
    return FlowDenoiser(_digits_unet(1), _shipped("flow"), **{"noise_schedule": "cosine", "is_latent": False} | options)


def _digits_edm2(file: str = "edm2", **options: Any) -> EDM2Denoiser:
    sizes: dict[str, Any] = {"image_size": 8, "in_channels": 1, "num_classes": 10, "model_channels": 32}
    sizes |= {"channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "logvar_channels": 32}
    return EDM2Denoiser(EDM2UNet(**sizes), _shipped(file), **{"sigma_data": 0.85, "noise_schedule": "cosine"} | options)


def _digits_classifier(**options: Any) -> OffTheShelfClassifier:
    return OffTheShelfClassifier(SmallResNet(), **{"num_classes": 10, "weights": _shipped("classifier")} | options)


def _cifar10(**options: Any) -> ADMDenoiser:
    network = PatchUNet(
        image_size=16,
        in_channels=3,
        model_channels=64,
        out_channels=3,
        num_res_blocks=2,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=10,
        num_head_channels=32,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    return ADMDenoiser(
        network, _shipped("diffusion", "cifar10"), **{"noise_schedule": "cosine", "prediction": "v"} | options
    )


def _cifar10_classifier(file: str = "classifier", **options: Any) -> OffTheShelfClassifier:
    network = SmallResNet(num_classes=10, in_channels=3, widths=(32, 96, 192, 256), blocks=1)
    return OffTheShelfClassifier(network, **{"num_classes": 10, "weights": _shipped(file, "cifar10")} | options)


# With the package.
_SHIPPED = {
    "digits": _digits,
    "digits_weak": partial(_digits, "weak", 16),
    "digits_flow": _digits_flow,
    "digits_edm2": _digits_edm2,
    "digits_edm2_early": partial(_digits_edm2, "edm2_early"),
    "digits_classifier": _digits_classifier,
    "cifar10": _cifar10,
    "cifar10_classifier": _cifar10_classifier,
    "cifar10_classifier_x0": partial(_cifar10_classifier, "classifier_x0"),
}


def _weights(card: registry.Card, checkpoint: str | Path | None) -> str:
    """The stated file; otherwise the one in ``checkpoints/``, or on the Hugging Face hub."""
    path = Path("checkpoints", card.file) if checkpoint is None else checkpoint
    if str(path).startswith(PREFIX) or Path(path).exists():
        return str(path)
    if checkpoint is None and card.source.startswith(PREFIX):
        return card.arguments.get("weights", card.source)
    raise CheckpointError(f"{path}: no such weights file; {card.where}. Name yours: checkpoint=PATH")


def load_pretrained(name: str, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """A published model with its weights, frozen: see :func:`calib_guidance.load_pretrained`."""
    if name in _SHIPPED and checkpoint is None:
        model = _SHIPPED[name](**options)
        return model.freeze() if isinstance(model, Classifier) else model
    if name in _GUIDED:
        return _load_guided(name, checkpoint, **options)
    card = registry.entry(name)
    if card.kind == "features":
        raise ValueError(f"{name} is for metrics alone: calib_guidance.evaluation.{card.used_by} takes it")
    if card.kind == "statistics":
        raise ValueError(f"{name} is not a model: {card.used_by} takes its file")
    weights = _weights(card, checkpoint)
    if card.kind in _BY_NAME:
        # Not of images, as some of EDM2's, nor of the latents of other autoencoders, which have to be stated.
        if card.kind in _VAES and "vae" not in options and card.arguments.get("in_channels", 4) == 4:
            options["vae"] = _weights(registry.entry(_VAES[card.kind]), None)
        model = _BY_NAME[card.kind](name, weights, **options)
    elif card.kind == "vae":
        model = {"TinyDecoder": TinyDecoder, "RAEDecoder": RAEDecoder}.get(card.used_by, VAEDecoder)(weights, **options)
    else:
        of_kind = {"classifier": OffTheShelfClassifier, "clip": CLIPClassifier}[card.kind]
        model = of_kind(**{**card.arguments, **options, "weights": weights})
    return model.freeze() if isinstance(model, Classifier) else model.eval().requires_grad_(False)


def _load_guided(name: str, checkpoint: str | Path | None, **options: Any) -> Combination:
    """EDM2 and its guiding network, whose files lie in one folder, ``checkpoint``."""
    model, _, _ = name.rpartition("_")
    average, guide, guide_average, weight = _GUIDED[name]
    folder = Path("checkpoints" if checkpoint is None else checkpoint)

    def file(card: str, ending: str) -> Path:
        return folder / f"{card.replace('_', '-')}-{ending}.pkl"

    negative = load_pretrained(guide, file(guide, guide_average), **options | {"vae": None})
    kind = Autoguidance if name.endswith("_autoguided") else UnconditionalModel
    return Combination(
        load_pretrained(model, file(model, average), **options), ClassifierFreeGuidance(weight), kind(negative)
    )
