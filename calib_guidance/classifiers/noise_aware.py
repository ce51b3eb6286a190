"""Classifiers of noisy images, trained for every noise level (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from calib_guidance.checkpoints import load_weights
from calib_guidance.classifiers.base import Classifier


class NoiseAwareClassifier(Classifier):
    """A network of (x_t, t), such as ADM's :class:`~calib_guidance.networks.EncoderUNet`.

    Args:
        network: maps ``(N, C, H, W)`` and steps ``(N,)`` to logits, and states its ``num_classes``.
        checkpoint: weights file; None leaves the network as it is (for ``fit``).
        temperature: of the logits, one or one for each of equal ranges of t, see :class:`~calib_guidance.classifiers.Classifier`.

    Raises:
        CheckpointError: the file does not fit, or says that it was calibrated otherwise.
    """

    def __init__(self, network: nn.Module, checkpoint: str | None = None, temperature: float | Sequence[float] = 1.0):
        super().__init__(temperature)
        self.network, self.num_classes = network, network.num_classes
        if checkpoint is not None:
            load_weights(network, checkpoint, **self.weights_notes)

    @property
    def weights_notes(self) -> dict[str, object]:
        """What a weights file says of itself beside its tensors, and must agree with when it is loaded."""
        return {
            "architecture": type(self.network).__name__,
            "num_classes": self.num_classes,
            "temperature": self.temperature,
        }

    def check_image(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError if images of ``(C, H, W)`` do not fit the network."""
        self.network.check_image(shape)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        if t is None:
            raise ValueError("a noise-aware classifier needs the step t: train it with noising Noisy, guide it at x_t")
        return self.temper(self.network(x, t), t)
