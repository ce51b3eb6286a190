"""The exact classifier of a Gaussian mixture."""

from torch import Tensor

from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture


class GaussianMixtureClassifier(Classifier):
    """The exact classifier of a mixture: p_t(y | x_t) given t, p(y | x0) otherwise.

    Args:
        mixture: the mixture.
        noise_aware: read t; false makes a classifier of clean samples, which ignores it.
    """

    def __init__(self, mixture: GaussianMixture, noise_aware: bool = False):
        super().__init__()
        self.mixture, self.noise_aware, self.num_classes = mixture, noise_aware, mixture.num_components

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.mixture.log_joint(x, t if self.noise_aware else None)
