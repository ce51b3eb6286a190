"""The diffusion models of ADM / guided-diffusion."""

from __future__ import annotations

import torch

from calib_guidance.checkpoints import load_weights
from calib_guidance.denoisers.discrete import DiscreteDenoiser
from calib_guidance.networks.adm import UNet
from calib_guidance.noise_schedule import NoiseSchedule, named_betas
from calib_guidance.parameterization import check_prediction


class ADMDenoiser(DiscreteDenoiser):
    """An ADM UNet over a linear or cosine schedule.

    Args:
        network: the UNet; twice as many output as input channels mean a learned variance.
        checkpoint: weights file; None keeps the network as it is.
        noise_schedule: ``linear`` (published 128, 256, 512) or ``cosine`` (published 64).
        num_steps: length of the diffusion process that it was trained for.
        prediction: ``epsilon`` (all published models) or ``v``.
        class_conditional: false hands no label to the network, which makes an unconditional model of one that was trained
            with label dropout.
        image_size: side in pixels of what is sampled; None takes the network's.
        compile: compile the network with torch.compile, for fixed shapes.

    Raises:
        CheckpointError: the file does not fit the network, or says that it was trained otherwise.
        ValueError: an image size that the network cannot take, or unknown names.
    """

    def __init__(
        self,
        network: UNet,
        checkpoint: str | None = None,
        noise_schedule: str = "linear",
        num_steps: int = 1000,
        prediction: str = "epsilon",
        class_conditional: bool = True,
        image_size: int | None = None,
        compile: bool = False,
    ):
        super().__init__()
        size = network.image_size if image_size is None else image_size
        self.image_shape = (network.in_channels, size, size)
        network.check_image(self.image_shape)
        if network.out_channels not in (network.in_channels, 2 * network.in_channels):
            raise ValueError(
                f"out_channels must be in_channels ({network.in_channels}) or, with learned variance, twice that; got "
                f"{network.out_channels}"
            )
        if checkpoint is not None:
            load_weights(network, checkpoint, prediction=prediction, noise_schedule=noise_schedule, num_steps=num_steps)
        self.network = network.eval().requires_grad_(False)
        self.schedule = NoiseSchedule(named_betas(noise_schedule, num_steps))
        check_prediction(prediction)
        self.prediction = prediction
        self.num_classes = network.num_classes if class_conditional else None
        self.has_learned_variance = network.out_channels == 2 * network.in_channels
        self._decode = torch.compile(network.decode, dynamic=False) if compile else network.decode
