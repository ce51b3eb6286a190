"""What the modules have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier

_GROSS = 0.5  # fraction of predicted classes


class Shared:
    """A callable that a deep copy of its owner shares with it.

    The callables that the command line makes of optimizers and rate schedules hold the whole command line, with trainer and
    data. A weight average copies the module, and would copy those too, which under DDP fails at a lock of the launcher's.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


def log_loss(module: L.LightningModule, loss: Tensor) -> None:
    """Log the loss of a training step, on the CPU in the progress bar too.

    Loggers read it every ``log_every_n_steps`` steps. A progress bar reads what it shows after each, and a GPU would have
    nothing to do until then.
    """
    module.log("train/loss", loss, prog_bar=module.device.type == "cpu")


def tell_smoothing(part: nn.Module, images: Tensor) -> None:
    """Say how much ``softplus_beta`` changes the outputs of a part's classifiers on ``images`` ``(N, C, H, W)``; warn if most."""
    for classifier in part.modules():
        if images.is_meta or not isinstance(classifier, OffTheShelfClassifier) or classifier.softplus_beta is None:
            continue
        changed, distance = classifier.smoothing_change(images)
        text = (
            f"softplus_beta {classifier.softplus_beta:g} in place of {', '.join(classifier.activations)} changes the class that "
            f"{classifier.weights_metadata['architecture']} predicts for {changed:.0%} of the first {len(images)} images, and "
            f"its probabilities by {distance:.2f} (mean total variation)"
        )
        if changed > _GROSS:
            rank_zero_warn(
                f"{text}: guidance follows what is left of the classifier; raise softplus_beta, or set it to null"
            )
        else:
            rank_zero_info(text)
