"""The diffusion models of ADM / guided-diffusion."""

from __future__ import annotations

from typing import Any

from calib_guidance.denoisers.discrete import DiscreteDenoiser
from calib_guidance.networks.adm import UNet


class ADMDenoiser(DiscreteDenoiser):
    """An ADM UNet over a linear or cosine schedule.

    Args:
        network: the UNet, twice as many output as input channels mean a learned variance; or a published
            name (``adm_imagenet128``, :mod:`calib_guidance.weights.registry`) for architecture and settings; or None, for the
            published one that has the shapes of the checkpoint.
    """

    kind = "adm"

    def __init__(self, network: UNet | str | None = None, *args: Any, **kwargs: Any):
        super().__init__(network, *args, **kwargs)
