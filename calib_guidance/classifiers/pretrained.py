"""Published models by name."""

from pathlib import Path
from typing import Any

from torch import nn

from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier
from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser, DiTDenoiser, EDMDenoiser, TinyDecoder, VAEDecoder
from calib_guidance.errors import CheckpointError
from calib_guidance.weights import registry
from calib_guidance.weights.hub import PREFIX

_BY_NAME = {"adm": ADMDenoiser, "edm": EDMDenoiser, "dit": DiTDenoiser, "adm_classifier": NoiseAwareClassifier}


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
    card = registry.entry(name)
    if card.kind == "features":
        raise ValueError(f"{name} is for metrics alone: calib_guidance.evaluation.{card.used_by} takes it")
    weights = _weights(card, checkpoint)
    if card.kind in _BY_NAME:
        if card.kind == "dit" and "vae" not in options:
            options["vae"] = _weights(registry.entry("sd_vae_ft_ema"), None)
        model = _BY_NAME[card.kind](name, weights, **options)
    elif card.kind == "vae":
        model = (TinyDecoder if card.used_by == "TinyDecoder" else VAEDecoder)(weights, **options)
    else:
        of_kind = {"classifier": OffTheShelfClassifier, "clip": CLIPClassifier}[card.kind]
        model = of_kind(**{**card.arguments, **options, "weights": weights})
    return model.freeze() if isinstance(model, Classifier) else model.eval().requires_grad_(False)
