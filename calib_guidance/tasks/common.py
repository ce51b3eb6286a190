"""What training and sampling say of the classifier at the start."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier

_GROSS = 0.5  # fraction of predicted classes


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
