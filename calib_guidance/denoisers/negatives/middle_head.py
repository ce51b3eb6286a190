"""Internal Guidance (arXiv 2512.24176)."""

from typing import Any

from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.flow import FlowDenoiser
from calib_guidance.denoisers.negatives.base import Negative, Pair, PredictPair
from calib_guidance.diffusion.schedules import NoiseLevels


class MiddleHead(Negative):
    """Internal Guidance: the velocity of the head in the middle of the same network, in the same evaluation.

    For an interval of its own, in place of the network's ``internal_guidance``, which is everywhere. Classifier-free guidance
    goes around it: ``Combination(Combination(denoiser, ClassifierFreeGuidance(1.4), MiddleHead(), interval), …)``.

    Examples:
        >>> from calib_guidance.denoisers import ClassifierFreeGuidance, Combination, FlowDenoiser
        >>> from calib_guidance.networks import LightningDiT
        >>> network = LightningDiT(sample_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, mid_depth=1)
        >>> denoiser = FlowDenoiser(network, path="linear", time_direction="noise_to_data", time_scale=1.0)
        >>> Combination(denoiser, ClassifierFreeGuidance(1.4), MiddleHead()).nfe  # both heads in one evaluation
        1
    """

    def check(self, denoiser: Denoiser) -> None:
        network: Any = getattr(denoiser, "network", None)
        if not isinstance(denoiser, FlowDenoiser) or getattr(network, "mid_depth", None) is None:
            raise ValueError("MiddleHead needs a FlowDenoiser whose network has a head in the middle (mid_depth)")
        if network.internal_guidance != 1:
            raise ValueError(
                f"the network guides internally already: set internal_guidance to 1, got {network.internal_guidance}"
            )

    def nfe(self, denoiser: Denoiser) -> int:
        return denoiser.nfe

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        assert isinstance(denoiser, FlowDenoiser)
        predict = denoiser.prepare_heads(levels, y, denoiser.network.velocities)

        def pair(x_t: Tensor, i: int | Tensor) -> Pair:
            own, middle = predict(x_t, i)
            return own, middle

        return pair
