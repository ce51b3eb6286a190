"""Denoisers around one network, and those of ADM / guided-diffusion among them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calib_guidance.backend.compilation import Compiled
from calib_guidance.backend.precision import Dtype
from calib_guidance.denoisers.base import Denoiser, Predict, x0_predictor
from calib_guidance.diffusion.parameterization import Parameterization, x0_coefficients
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule, ScheduleName, named_betas
from calib_guidance.networks.adm import UNet
from calib_guidance.weights.loading import load_network


class NetworkDenoiser(Denoiser):
    """A denoiser around one network: ``embed_time(t)`` and ``embed_labels(y)``, whose sum goes into ``decode(x, emb)``.

    Args:
        stated: settings of the configuration, see :func:`~calib_guidance.weights.loading.load_network`.
        network: the network; a published name (:mod:`calib_guidance.weights.registry`); or None, for what the checkpoint tells.
        checkpoint: weights file; None keeps the network as it is.
        class_conditional: false hands no label to the network, which makes an unconditional model of one that was trained
            with label dropout.
        image_size: side in pixels of what is sampled; None takes the network's.
        compile: compile the network, see :class:`~calib_guidance.backend.compilation.Compiled`.
        dtype: ``float16``, ``bfloat16`` or ``float32`` of the body of a network that is built here; ``auto`` takes what is fast
            on this machine (:func:`~calib_guidance.backend.precision.fast_dtype`); None takes the one it was published with
            (for most float16; CPUs compute faster in float32 or bfloat16), and float32 for others.
    """

    kind: str
    network: Any  # a UNet, a DiT or an EDM network
    _decode: Callable[..., Tensor]

    def __init__(
        self,
        stated: dict[str, Any],
        network: nn.Module | str | None = None,
        checkpoint: str | None = None,
        class_conditional: bool = True,
        image_size: int | None = None,
        compile: bool = False,
        dtype: Dtype | None = None,
    ):
        super().__init__()
        built, self.settings, self.provenance = load_network(network, self.kind, checkpoint, dtype, **stated)
        size = built.image_size if image_size is None else image_size
        self.image_shape = (built.in_channels, size, size)
        built.check_image(self.image_shape)
        if built.out_channels not in (built.in_channels, 2 * built.in_channels):
            raise ValueError(f"out_channels must be in_channels or, with variance, twice; got {built.out_channels}")
        self.network, self.is_compiled = built, compile
        self.has_learned_variance = built.out_channels == 2 * built.in_channels
        self.num_classes = built.num_classes if class_conditional else None
        self._decode = Compiled(built.decode) if compile else built.decode


class DiscreteDenoiser(NetworkDenoiser):
    """A network of x_t and t that predicts ε or v and, in further channels, the variance of the reverse step.

    Args:
        noise_schedule: ``linear`` (published ADM 128, 256, 512, and DiT) or ``cosine`` (published ADM 64); None takes what the
            weights were published with or say of themselves, ``linear`` without weights.
        num_steps: length of the diffusion process that it was trained for.
        prediction: ``epsilon`` (all published models) or ``v``; None as for ``noise_schedule``, ``epsilon`` without weights.
    """

    def __init__(
        self,
        network: nn.Module | str | None = None,
        checkpoint: str | None = None,
        noise_schedule: ScheduleName | None = None,
        num_steps: int = 1000,
        prediction: Parameterization | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        stated = {"noise_schedule": noise_schedule, "prediction": prediction, "num_steps": num_steps}
        super().__init__(stated, network, checkpoint, *args, **kwargs)
        self.prediction = self.settings["prediction"]
        self.schedule = NoiseSchedule(named_betas(self.settings["noise_schedule"], num_steps))
        x0_coefficients(self.prediction, self.schedule.alphas_cumprod)  # checks the name, which may be the file's

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        network = self.network
        device = next(network.parameters()).device
        time = network.embed_time(torch.tensor(levels.times, device=device))
        if y is None or self.num_classes is None:
            y = torch.full((1,), -1, device=device)
        label = 0.0 if network.num_classes is None else network.embed_labels(y)

        def output(x_t: Tensor, i: int | Tensor) -> Tensor:
            emb = (time[i] + label).expand(len(x_t), -1)
            return self._decode(x_t.to(emb.dtype), emb)  # one type for all samplers: one graph

        return x0_predictor(self, output, levels, device)


class ADMDenoiser(DiscreteDenoiser):
    """An ADM UNet over a linear or cosine schedule.

    Args:
        network: the UNet, twice as many output as input channels mean a learned variance; or a published
            name (``adm_imagenet128``, :mod:`calib_guidance.weights.registry`) for architecture and settings; or None, for the
            published one that has the shapes of the checkpoint.

    Examples:
        >>> network = UNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,))
        >>> denoiser = ADMDenoiser(network, noise_schedule="linear")  # untrained, so ε = 0 and x̂0 = x_t/√ᾱ, here 1/√0.9999
        >>> round(float(denoiser(torch.ones(1, 1, 8, 8), 0).x0.mean()), 5)
        1.00005
    """

    kind = "adm"

    def __init__(self, network: UNet | str | None = None, *args: Any, **kwargs: Any):
        super().__init__(network, *args, **kwargs)
