"""What every classifier is to guidance."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.backend.compilation import Compiled


class Classifier(nn.Module, ABC):
    """Base class of classifiers: ``classifier(x, t) -> logits``.

    ``x`` is ``(N, C, H, W)`` in [-1, 1] (a clean image or its estimate) or the noisy x_t, ``t`` ``(N,)`` the diffusion
    step on the 0 … 999 scale, which classifiers of clean images ignore. Logits are ``(N, num_classes)``.

    Args:
        temperature: T > 0 by which :meth:`temper` divides logits; one for all steps, or one for each of equal ranges of t,
            the cleanest first (Guo et al. 2017; see :func:`~calib_guidance.classifiers.fit_temperature`).
        num_steps: length of the diffusion process that the ranges divide.
        class_names: by number, as ``fit`` exports them; ``imagenet`` for those of torchvision; None where they are not known.
        compile: compile the network once it is frozen, see :class:`~calib_guidance.backend.compilation.Compiled`.

    Attributes:
        compiled_module: name of the module that ``compile`` is about.

    Examples:
        >>> class Sign(Classifier):  # a classifier of your own: class 1 of bright images
        ...     num_classes = 2
        ...     def forward(self, x, t):
        ...         mean = x.mean(dim=(1, 2, 3))
        ...         return self.temper(torch.stack([-mean, mean], dim=1), t)
        >>> Sign(temperature=2.0)(torch.ones(1, 1, 2, 2), torch.tensor([0]))
        tensor([[-0.5000,  0.5000]])
    """

    num_classes: int
    compiled_module = "network"

    def __init__(
        self,
        temperature: float | Sequence[float] = 1.0,
        num_steps: int = 1000,
        compile: bool = False,
        class_names: str | Sequence[str] | None = None,
    ):
        super().__init__()
        values = torch.tensor(temperature, dtype=torch.float32).reshape(-1)
        # In plain numbers: under torch.device("meta") the tensor has none.
        if not values.numel() or not all(v > 0 for v in np.ravel(temperature)):
            raise ValueError(f"temperature must be a number above 0, or one for each range of t; got {temperature}")
        self.temperature = [float(v) for v in temperature] if isinstance(temperature, Sequence) else float(temperature)
        self.class_names = class_names
        self.num_steps, self.is_compiled, self._compiled = num_steps, compile, None
        self.register_buffer("_inverse_temperature", 1 / values, persistent=False)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor: ...

    @property
    def temperature_metadata(self) -> dict[str, object]:
        """What a weights file says of :meth:`temper`: the temperature and, where it depends on t, the steps of the process."""
        steps = {"num_steps": self.num_steps} if isinstance(self.temperature, list) else {}
        return {"temperature": self.temperature} | steps

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError if images of ``(C, H, W)`` do not fit, where the classifier can tell."""

    def temper(self, logits: Tensor, t: Tensor | None) -> Tensor:
        """Logits ``(N, K)`` divided by the temperature at t ``(N,)``."""
        if self.temperature == 1.0:
            return logits
        if len(self._inverse_temperature) == 1:
            return logits * self._inverse_temperature
        if t is None:
            raise ValueError("this classifier's temperature depends on the diffusion step: call it with t")
        level = t * len(self._inverse_temperature) // self.num_steps
        return logits * self._inverse_temperature[level].unsqueeze(1)

    def freeze(self) -> Self:
        """Make the classifier ready to guide: evaluation mode, no parameter gradients, compiled where asked for."""
        if self.is_compiled and self._compiled is None:
            self._compiled = Compiled(self.get_submodule(self.compiled_module))
        return self.eval().requires_grad_(False)


class Standardize(nn.Module):
    """Images in [-1, 1] to the colors (x' − mean)/std that a network was trained with, of x' = (x + 1)/2 in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("scale", (0.5 / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", ((0.5 - mean) / std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset
