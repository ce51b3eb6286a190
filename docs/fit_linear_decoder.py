"""Fit the linear decoder to an autoencoder, to guide a latent model through it (docs/latent_guidance.md).

    python docs/fit_linear_decoder.py --vae hf://stabilityai/sd-vae-ft-ema --images data/imagenet/val \\
        --output checkpoints/linear_decoder.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from calib_guidance.backend.images import from_uint8
from calib_guidance.denoisers import VAEDecoder, fit_linear_decoder
from calib_guidance.denoisers.decoders import EDM2_MEAN, EDM2_STD, Latents, Upsampling
from calib_guidance.weights.diffusers_folder import load_model

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def batches(paths: list[Path], size: int, batch: int) -> Iterator[Tensor]:
    """Images ``(N, 3, size, size)`` in [-1, 1], resized and cut from the center."""
    prepare = v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    for start in range(0, len(paths), batch):
        images = [prepare(Image.open(path).convert("RGB")) for path in paths[start : start + batch]]
        yield from_uint8(torch.stack(images))


@torch.no_grad()
def main(args: list[str] | None = None) -> None:
    """Fit, say how good it is, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", required=True, help="diffusers folder, or hf://OWNER/NAME")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched below too")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--count", type=int, default=256, help="images, taken evenly from the folder (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="at a time (%(default)s)")
    parser.add_argument("--latent-scale", type=float, default=0.18215, help="as in the denoiser (%(default)s)")
    parser.add_argument(
        "--latents", choices=get_args(Latents), default="stable_diffusion", help="edm2: those of EDM2 instead"
    )
    parser.add_argument("--upsampling", choices=get_args(Upsampling), default="bilinear")
    options = parser.parse_args(args)
    paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{options.images}: no images ({', '.join(sorted(SUFFIXES))}) in it")
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_model(options.vae, "AutoencoderKL", "vae").to(device)
    decoder = VAEDecoder(vae, options.latent_scale)
    if options.latents == "edm2":
        decoder = VAEDecoder(vae, [0.5 / std for std in EDM2_STD], latent_mean=EDM2_MEAN, unit_range=True)

    def encode(images: Tensor) -> Tensor:
        raw = vae.encode((images + 1) / 2 if decoder.unit_range else images).latent_dist.mean
        return (raw - decoder.mean) * decoder.scale

    latents = (encode(images.to(device)) for images in batches(paths, options.size, options.batch))
    linear, explained = fit_linear_decoder(decoder, latents, options.upsampling)
    linear.save(options.output)
    print(f"{options.output}: explains {100 * explained:.1f} % of the variance of {len(paths)} decoded images")


if __name__ == "__main__":
    main()
