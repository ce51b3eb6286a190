"""Draw the README's first picture: the same noise unguided, with plain guidance, and with calibrated guidance.

Writes ``images/same_noise.png``: ``python docs/first_picture.py [--output docs]``. Ten digits, one of each class, from the
unconditional diffusion model in ``checkpoints/digits``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from calib_guidance import classifiers, denoisers, diffusion, guidance, networks, plots, samplers, scores
from calib_guidance.backend.images import to_uint8

WEIGHTS = Path("checkpoints/digits")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs", help="folder of images/")
    folder = Path(parser.parse_args().output) / "images"
    network = networks.UNet(
        image_size=8,
        in_channels=1,
        model_channels=32,
        out_channels=2,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=10,
        num_head_channels=32,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    denoiser = denoisers.ADMDenoiser(
        network, WEIGHTS / "diffusion.safetensors", "cosine", prediction="v", class_conditional=False
    )

    def classifier(beta: float | None) -> classifiers.OffTheShelfClassifier:
        return classifiers.OffTheShelfClassifier(
            networks.SmallResNet(), 10, WEIGHTS / "classifier.safetensors", softplus_beta=beta
        )

    methods = {
        "unguided": None,
        "plain": guidance.ClassifierGuidance(classifier(None), scores.TemperedLogProb()),
        "calibrated": guidance.ClassifierGuidance(classifier(3.0), scores.TemperedLogProb(tau2=0.8)),
    }
    y = torch.arange(10)
    runs = {}
    for name, guide in methods.items():
        noise = diffusion.SampleStreams(seeds=[SEED] * 10, indices=range(10), shape=denoiser.image_shape)
        images = samplers.DDPM(steps="100")(denoiser, noise, y, guide)
        runs[name] = {"index": torch.arange(10), "label": y, "image": to_uint8(images).numpy()}
    print(*plots.side_by_side(runs, folder / "same_noise", samples=10), sep="\n")


if __name__ == "__main__":
    main()
