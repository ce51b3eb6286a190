"""The diffusion models of ADM / guided-diffusion."""

from __future__ import annotations

from calib_guidance.backend.compilation import Compiled
from calib_guidance.backend.precision import Dtype
from calib_guidance.denoisers.discrete import DiscreteDenoiser
from calib_guidance.diffusion.parameterization import Parameterization, check_prediction
from calib_guidance.diffusion.schedules import NoiseSchedule, ScheduleName, named_betas
from calib_guidance.networks.adm import UNet
from calib_guidance.weights.loading import load_network


class ADMDenoiser(DiscreteDenoiser):
    """An ADM UNet over a linear or cosine schedule.

    Args:
        network: the UNet, twice as many output as input channels mean a learned variance; or a published
            name (``adm_imagenet128``, :mod:`calib_guidance.weights.registry`) for architecture and settings; or None, for the
            published one that has the shapes of the checkpoint.
        checkpoint: weights file; None keeps the network as it is.
        noise_schedule: ``linear`` (published 128, 256, 512) or ``cosine`` (published 64); None takes what the weights were
            published with or say of themselves, ``linear`` without weights.
        num_steps: length of the diffusion process that it was trained for.
        prediction: ``epsilon`` (all published models) or ``v``; None as for ``noise_schedule``, ``epsilon`` without weights.
        class_conditional: false hands no label to the network, which makes an unconditional model of one that was trained
            with label dropout.
        image_size: side in pixels of what is sampled; None takes the network's.
        compile: compile the network, see :class:`~calib_guidance.backend.compilation.Compiled`.
        dtype: of a published network's convolutions: ``float16``, ``bfloat16`` or ``float32``; None takes the published
            one, which for most is float16. CPUs compute faster in float32 or bfloat16.
    """

    def __init__(
        self,
        network: UNet | str | None = None,
        checkpoint: str | None = None,
        noise_schedule: ScheduleName | None = None,
        num_steps: int = 1000,
        prediction: Parameterization | None = None,
        class_conditional: bool = True,
        image_size: int | None = None,
        compile: bool = False,
        dtype: Dtype | None = None,
    ):
        super().__init__()
        stated = {"noise_schedule": noise_schedule, "prediction": prediction, "num_steps": num_steps}
        network, settings, self.provenance = load_network(network, "adm", checkpoint, dtype, **stated)
        size = network.image_size if image_size is None else image_size
        self.image_shape = (network.in_channels, size, size)
        network.check_image(self.image_shape)
        if network.out_channels not in (network.in_channels, 2 * network.in_channels):
            raise ValueError(
                f"out_channels must be in_channels ({network.in_channels}) or, with learned variance, twice that; got "
                f"{network.out_channels}"
            )
        check_prediction(settings["prediction"])
        self.network, self.prediction = network, settings["prediction"]
        self.schedule = NoiseSchedule(named_betas(settings["noise_schedule"], num_steps))
        self.num_classes = network.num_classes if class_conditional else None
        self.has_learned_variance = network.out_channels == 2 * network.in_channels
        self.is_compiled = compile
        self._decode = Compiled(network.decode) if compile else network.decode
