"""Draw the README's first picture: the same noise unguided, with plain guidance, and with calibrated guidance.

Writes ``images/same_noise.png``: ``python docs/first_picture.py [--output docs]``. Ten digits, one of each class, from the
unconditional diffusion model in ``checkpoints/digits``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import calib_guidance
from calib_guidance import classifiers, diffusion, guidance, plots, samplers, scores
from calib_guidance.backend.images import to_uint8

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs", help="folder of images/")
    folder = Path(parser.parse_args().output) / "images"
    denoiser = calib_guidance.load_pretrained("digits", class_conditional=False)

    def classifier(beta: float | None) -> classifiers.Classifier:
        return calib_guidance.load_pretrained("digits_classifier", softplus_beta=beta)

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
        runs[name] = [*to_uint8(images).numpy()]
    print(*plots.side_by_side(runs, [str(label) for label in y.tolist()], folder / "same_noise"), sep="\n")


if __name__ == "__main__":
    main()
