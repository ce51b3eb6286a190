"""Feature extractors for distances between sets of images."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from calib_guidance.checkpoints import tensors_only
from calib_guidance.classifiers.base import Classifier
from calib_guidance.images import from_uint8


class FeatureExtractor(nn.Module, ABC):
    """Maps 8-bit images to features, and to logits where it is a judge.

    ``name`` says in reports what the numbers were measured with.
    """

    name: str

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(N, D)`` and, of a judge, logits ``(N, K)`` of uint8 images ``(N, C, H, W)``."""


class JudgeFeatures(FeatureExtractor):
    """What a classifier's last linear layer sees, and what it says: for data that Inception does not know.

    Args:
        classifier: the judge; independent of those that guide, or the figures flatter.

    Raises:
        ValueError: a classifier without a linear layer.
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier.freeze()
        linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("features: the judge has no linear layer whose input could serve as features")
        self.name = f"input of the last linear layer ({linear[-1].in_features} wide) of {type(classifier).__name__}"
        self._seen: list[Tensor] = []
        linear[-1].register_forward_pre_hook(lambda module, inputs: self._seen.append(inputs[0]))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self._seen.clear()
        logits = self.classifier(from_uint8(images))
        return self._seen.pop().flatten(1).float(), logits.float()


class InceptionFeatures(FeatureExtractor):
    """Pool features (2048) of the Inception-v3 that FID is defined with, through torch-fidelity.

    Args:
        weights: local ``pt_inception-2015-12-05-6726825d.pth``; None lets torch-fidelity download it.

    Raises:
        ImportError: torch-fidelity is not installed.
    """

    name = "Inception-v3 (2015-12-05) pool features, torch-fidelity"

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "InceptionFeatures needs torch-fidelity: pip install 'calib_guidance[inception]'"
            ) from error
        with tensors_only():
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network(images.expand(-1, 3, -1, -1))[0].float(), None
