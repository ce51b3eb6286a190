"""What the networks of discrete processes have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction, at_step
from calib_guidance.diffusion.parameterization import x0_coefficients
from calib_guidance.diffusion.schedules import NoiseLevels


class DiscreteDenoiser(Denoiser):
    """A network of x_t and t that predicts ε or v and, in further channels, the variance of the reverse step.

    Attributes:
        network: an ADM UNet or a DiT: ``embed_time(t)`` and ``embed_labels(y)``, of which the sum goes into ``decode(x, emb)``.
        prediction: ``epsilon`` or ``v``.
            What a label of -1 embeds as is the network's to say: nothing, or a null class of its own.
        num_classes: where it is None, all labels are -1.
        _decode: ``network.decode``, compiled where asked for.
    """

    network: nn.Module
    prediction: str
    _decode: Callable[[Tensor, Tensor], Tensor]

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        network = self.network
        device = next(network.parameters()).device
        time = network.embed_time(torch.tensor(levels.times, device=device))
        if y is None or self.num_classes is None:
            y = torch.full((1,), -1, device=device)
        label = 0.0 if network.num_classes is None else network.embed_labels(y)
        coefficients = x0_coefficients(self.prediction, levels.alphas_cumprod)
        from_x, from_output = (torch.tensor(c, device=device).float() for c in coefficients)

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            output, variance = self._decode(x_t, (time[i] + label).expand(len(x_t), -1)), None
            if self.has_learned_variance:
                output, variance = output.chunk(2, dim=1)
                variance = (variance + 1) / 2
            return Prediction(at_step(from_x, i) * x_t + at_step(from_output, i) * output, variance)

        return predict
