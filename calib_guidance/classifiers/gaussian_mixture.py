"""The exact classifier of a Gaussian mixture."""

from torch import Tensor

from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture


class GaussianMixtureClassifier(Classifier):
    """The exact classifier of a mixture: p_t(y | x_t) given t, p(y | x0) otherwise.

    Args:
        mixture: the mixture.
        noise_aware: read t; false makes a classifier of clean samples, which ignores it.

    Examples:
        >>> model = GaussianMixture(means=[[-1.0], [1.0]], covariances=[1.0, 1.0])
        >>> logits = GaussianMixtureClassifier(model)(torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]))
        >>> logits.diff().exp()  # p(1 | x)/p(0 | x) = exp(2·x)
        tensor([[2.7183]], dtype=torch.float64)
    """

    def __init__(self, mixture: GaussianMixture, noise_aware: bool = False):
        super().__init__()
        self.mixture, self.noise_aware, self.num_classes = mixture, noise_aware, mixture.num_components

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.mixture.log_joint(x, t if self.noise_aware else None)
