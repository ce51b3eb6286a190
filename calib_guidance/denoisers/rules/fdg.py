"""Frequency-decoupled guidance, FDG (Sadat et al. 2025, arXiv 2506.19713)."""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.denoisers.rules.apg import project
from calib_guidance.denoisers.rules.base import Level, Representation, Rule, from_x0, to_x0
from calib_guidance.errors import check_choice, check_numbers


class FDG(Rule):
    """Frequency-decoupled guidance (FDG).

    Classifier-free guidance with a weight for each band of a Laplacian pyramid: c_b + (w_b − 1)·(s⊥ + η_b·s∥) in band b.

    s = c_b − u_b, and s∥ is its projection on c_b. A band is x_k − up(x_{k+1}), the last what is left: half the side by a 5×5
    binomial blur and bilinear halving, and back by bilinear doubling and the same blur. Where all η are 1 the rule is linear, so
    that x̂0, ε and v give the same.

    Args:
        weights: w_b from the highest frequencies to the lowest. Equal weights are classifier-free guidance. The source has
            ``[10, 5]`` for Stable Diffusion XL.
        parallel: η of every band, or one per band; 1 projects nothing. (diffusers adds w·(s⊥ + η·s∥) to u_b by default, another
            rule unless η = 1.)
        representation: ``x0``, ``epsilon`` or ``v``: where it is projected.

    Examples:
        >>> cond, uncond = torch.full((1, 1, 8, 8), 2.0), torch.full((1, 1, 8, 8), 1.0)
        >>> guided = FDG(weights=(10.0, 3.0))(cond, uncond, Level(*torch.zeros(5)), {})
        >>> round(float(guided.mean()), 4)  # constant images have the lowest frequency alone: 1 + 3·(2 − 1)
        4.0
    """

    kernel: Tensor

    def __init__(
        self,
        weights: Sequence[float] = (10.0, 5.0),
        parallel: float | Sequence[float] = 1.0,
        representation: Representation = "x0",
    ):
        super().__init__()
        if len(weights) < 2:
            raise ValueError(f"weights must be two or more, from high to low frequencies, got {list(weights)}")
        each = [parallel] * len(weights) if isinstance(parallel, (int, float)) else list(parallel)
        if len(each) != len(weights):
            raise ValueError(f"parallel must be a number, or one for each of {len(weights)} weights, got {each}")
        for weight, part in zip(weights, each, strict=True):
            check_numbers(weights=weight, parallel=part)
        check_choice("representation", representation, get_args(Representation))
        self.weights, self.parallel = tuple(weights), tuple(each)
        self.representation: Representation = representation
        binomial = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        self.register_buffer("kernel", torch.outer(binomial, binomial), persistent=False)

    def _blur(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 3:
            raise ValueError(f"FDG cannot halve this sample {len(self.weights) - 1} times: give fewer weights")
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        if set(self.parallel) == {1}:
            return x0_cond + self._sum_of_bands(x0_cond - x0_uncond, None)
        cond, uncond = (from_x0(x0, level, self.representation) for x0 in (x0_cond, x0_uncond))
        return to_x0(cond + self._sum_of_bands(cond - uncond, cond), level, self.representation)

    def _sum_of_bands(self, difference: Tensor, cond: Tensor | None) -> Tensor:
        """The weighted bands of c − u, each projected on that of c where it is given, added up."""
        count = len(self.weights)
        bands = self._pyramid(difference)
        if cond is not None:
            onto = self._pyramid(cond)
            bands = [project(bands[b], onto[b], self.parallel[b]) for b in range(count)]
        image = (self.weights[-1] - 1) * bands[-1]
        for b in reversed(range(count - 1)):
            image = (self.weights[b] - 1) * bands[b] + self._up(image, bands[b].shape[2:])
        return image

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """The bands, from high to low frequencies."""
        bands = []
        for _ in self.weights[:-1]:
            size = image.shape[2:]
            low = F.interpolate(self._blur(image), [(side + 1) // 2 for side in size], mode="bilinear")
            bands.append(image - self._up(low, size))
            image = low
        return [*bands, image]

    def _up(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self._blur(F.interpolate(x, list(size), mode="bilinear"))
