"""Losses of the CIFAR-10 models over training: ``python docs/cifar10_training.py [OUTPUTS]``.

Reads the logs of ``outputs/cifar10_*``, or OUTPUTS/*, keeps them in ``cifar10_training.json`` and draws
``images/cifar10_training.png``. Without logs the plot is only made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from calib_guidance.backend.atomic import write_text
from calib_guidance.plots import COLORS

DOCS = Path(__file__).parent
MODELS = {
    "diffusion": "diffusion model, loss of v",
    "classifier": "classifier, cross-entropy",
    "eval_classifier": "evaluation classifier, cross-entropy",
    "noise_aware": "noise-aware classifier, cross-entropy",
}
VALIDATION = ("val/loss", "val/nll")
EVERY = 10  # logged training losses are averaged, to keep the file small


def read(folder: Path) -> dict[str, Any]:
    """Losses by step, and hours of training, of the TensorBoard logs below a folder; interruptions are not counted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    seconds = 0.0
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        for name in {"train/loss", "val/accuracy", *VALIDATION}.intersection(tags):
            found.setdefault(name, {}).update({each.step: each.value for each in events.Scalars(name)})
        if "train/loss" in tags:
            times = [each.wall_time for each in events.Scalars("train/loss")]
            seconds += times[-1] - times[0]
    losses = sorted(found.pop("train/loss").items())
    blocks = [losses[i : i + EVERY] for i in range(0, len(losses), EVERY)]
    mean = [[block[-1][0] + 1, round(sum(value for _, value in block) / len(block), 4)] for block in blocks]
    heldout = {
        name: [[step + 1, round(value, 4)] for step, value in sorted(each.items())] for name, each in found.items()
    }
    return {"hours": round(seconds / 3600, 2), "train/loss": mean, **heldout}


def draw(models: dict[str, Any], path: Path) -> None:
    """One panel per model: training loss, and that of held-out images."""
    figure, axes = plt.subplots(2, 2, figsize=(6.4, 4.2))
    for axis, (name, title) in zip(axes.flat, MODELS.items(), strict=True):
        axis.plot(*zip(*models[name]["train/loss"], strict=True), color=COLORS[0], lw=1.2, label="training")
        for key in VALIDATION:
            if key in models[name]:
                style = {"color": COLORS[1], "marker": "o", "ms": 3.5, "lw": 1.2}
                axis.plot(*zip(*models[name][key], strict=True), **style, label="held-out images")
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step of 128 images", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, -0.05), ncols=2, frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Read the logs, where they are, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outputs", type=Path, nargs="?", help="folder of the models' folders")
    folder = parser.parse_args().outputs
    kept = DOCS / "cifar10_training.json"
    if folder is not None:
        logs = {
            name: next(path for path in (folder / f"cifar10_{name}", folder / name) if path.exists()) for name in MODELS
        }
        write_text(kept, json.dumps({name: read(path) for name, path in logs.items()}) + "\n")
    draw(json.loads(kept.read_text()), DOCS / "images/cifar10_training.png")


if __name__ == "__main__":
    main()
