"""Draw the README's first picture: the same noise unguided, with plain guidance, and with calibrated guidance.

Writes ``images/same_noise.png``: ``python docs/first_picture.py [--output docs]``. Ten images of CIFAR-10, one of each class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import calib_guidance
from calib_guidance import diffusion, guidance, plots, samplers, scores
from calib_guidance.backend.images import to_uint8

SEED = 0
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs", help="folder of images/")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    denoiser = calib_guidance.load_pretrained("cifar10", class_conditional=False)
    as_trained = calib_guidance.load_pretrained("cifar10_classifier")
    calibrated = calib_guidance.load_pretrained("cifar10_classifier_x0", softplus_beta=10.0)
    methods = {
        "unguided": None,
        "plain": guidance.ClassifierGuidance(as_trained, scores.TemperedLogProb(), scale=4.0),
        "calibrated": guidance.ClassifierGuidance(calibrated, scores.TemperedLogProb(tau2=0.8), scale=4.0),
    }
    y = torch.arange(10)
    runs = {}
    for name, guide in methods.items():
        noise = diffusion.SampleStreams(seeds=[options.seed] * 10, indices=range(10), shape=denoiser.image_shape)
        images = samplers.DPMSolver(steps=50, sde=True)(denoiser, noise, y, guide)
        runs[name] = [*to_uint8(images).numpy()]
    path = Path(options.output) / "images" / "same_noise"
    print(*plots.side_by_side(runs, CLASSES, path, width=7), sep="\n")


if __name__ == "__main__":
    main()
