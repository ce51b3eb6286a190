"""Calibrated classifier guidance of diffusion models.

Implements *Elucidating the design space of classifier-guided diffusion generation* (arXiv 2310.11311) and *Enhancing
diffusion model guidance through calibration and regularization* (arXiv 2511.05844).
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("calib_guidance")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"


def load_pretrained(name: str, checkpoint: str | PathLike[str] | None = None, **options: Any) -> nn.Module:
    """A published model with its weights, frozen and in evaluation mode.

    ::

        denoiser = calib_guidance.load_pretrained("digits", class_conditional=False)  # comes with the package
        denoiser = calib_guidance.load_pretrained("adm_imagenet128", dtype="float32")
        classifier = calib_guidance.load_pretrained("adm_classifier128")

    Args:
        name: of a model in ``checkpoints/README.md``: a denoiser (``adm_imagenet128``, ``edm_imagenet64``, ``dit_xl_2_256``), a
            classifier (``adm_classifier128``, ``resnet101_v2``, ``clip_vit_l_14_336``) or a decoder of latents (``taesd``).
            ``digits``, ``digits_flow``, ``digits_edm2`` and ``digits_classifier`` come with the package, and ``digits_weak`` and
            ``digits_edm2_early`` for autoguidance of ``digits`` and ``digits_edm2``. So do ``cifar10``, ``cifar10_classifier``
            and, fine-tuned, ``cifar10_classifier_x0``.
            Or EDM2 under its published guidance: ``edm2_img64_s_autoguided``, ``edm2_img512_{s,xxl}_{autoguided,guided}``; then
            ``checkpoint`` is the folder of both files.
        checkpoint: its file or folder, or ``hf://OWNER/REPO/PATH``; None takes the published file name in ``checkpoints/`` below
            the current folder, then the Hugging Face hub where the model is published there.
        options: of the class that takes the weights, such as ``dtype``; CLIP needs ``prompts``. Latent models get
            their autoencoder, found in the same way, unless ``vae`` is stated.

    Returns:
        A denoiser, classifier or decoder.
    """
    from calib_guidance.classifiers.pretrained import load_pretrained as load  # imports torch

    return load(name, checkpoint, **options)


def from_diffusers(model: Any, **options: Any) -> nn.Module:
    """A model of the diffusers library as a denoiser: see :class:`~calib_guidance.denoisers.DiffusersDenoiser`.

    ::

        denoiser = calib_guidance.from_diffusers("hf://google/ddpm-cifar10-32")
        denoiser = calib_guidance.from_diffusers(pipeline, prompts=["a photo of a cat", "a photo of a dog"])

    Args:
        model: a pipeline or its folder, ``hf://OWNER/NAME``, or a model with ``scheduler``.
        options: of the class, such as ``prompts`` and ``dtype``.
    """
    from calib_guidance.denoisers import DiffusersDenoiser  # imports torch

    return DiffusersDenoiser(model, **options)
