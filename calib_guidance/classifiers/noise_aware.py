"""Classifiers of noisy images, trained for every noise level (Dhariwal & Nichol 2021)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from calib_guidance.backend.precision import Dtype
from calib_guidance.classifiers.base import Classifier
from calib_guidance.weights import registry
from calib_guidance.weights.io import WeightsFile, load_weights, part_of, read_weights


class NoiseAwareClassifier(Classifier):
    """A network of (x_t, t), such as ADM's :class:`~calib_guidance.networks.EncoderUNet`.

    Args:
        network: maps ``(N, C, H, W)`` and steps ``(N,)`` to logits, and states its ``num_classes``; or a published name
            (``adm_classifier128``); or None, for the published one that has the shapes of the checkpoint.
        checkpoint: weights file; None leaves the network as it is (for ``fit``).
        dtype: of a published network's convolutions; None takes float32, in which the published samples were made.

    Attributes:
        noise_schedule: name of the one whose steps t are, where it is known: of published weights.

    Examples:
        >>> from calib_guidance.networks import EncoderUNet
        >>> sizes = {"in_channels": 1, "model_channels": 32, "channel_mult": (1,), "num_head_channels": 32}
        >>> classifier = NoiseAwareClassifier(EncoderUNet(image_size=8, out_channels=10, **sizes))
        >>> classifier(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module | str | None = None,
        checkpoint: WeightsFile | str | None = None,
        dtype: Dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        weights = None if checkpoint is None else read_weights(checkpoint)
        network, card = registry.build(network, "adm_classifier", dtype, weights and weights.state)
        self.network, self.num_classes = network, network.num_classes
        # What a file of this project's own says of itself shows that it was trained here, on whatever noise.
        own = card is None or (weights is not None and weights.metadata)
        self.noise_schedule = None if own else card.settings["noise_schedule"]
        self.provenance = dict(self.weights_metadata)
        if weights is not None:
            self.provenance |= load_weights(network, part_of(weights, network), **self.weights_metadata)

    @property
    def weights_metadata(self) -> dict[str, object]:
        """What a weights file says of itself beside its tensors, and must agree with when it is loaded."""
        own = {"architecture": type(self.network).__name__, "num_classes": self.num_classes}
        return own | self.temperature_metadata | registry.nonstate_hparams(self.network)

    def check_image(self, shape: Sequence[int]) -> None:
        self.network.check_image(shape)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        if t is None:
            raise ValueError(
                "a noise-aware classifier needs the step t: train it with NoisyInput and guide with classifier_input: x_t"
            )
        network = self._compiled or self.network
        return self.temper(network(x, t), t)
