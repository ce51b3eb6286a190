"""What a rule is."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers

Representation = Literal["x0", "epsilon", "v"]


class Level(NamedTuple):
    """Noise level of a rule: noisy images, and float32 scalars, ``(N, 1, 1, 1)`` where samples have steps of their own.

    Examples:
        >>> level = Level(torch.ones(1, 1, 1, 1), *torch.tensor([500.0, 0.5, 1.0, 0.5]))
        >>> float(from_x0(torch.zeros(1, 1, 1, 1), level, "epsilon"))  # ε = (x_t − √ᾱ·x̂0)/√(1 − ᾱ) = √2
        1.4142135381698608
    """

    x_t: Tensor  # (N, C, H, W), to convert x̂0 to ε or v
    t: Tensor  # step of the full process
    alphas_cumprod: Tensor  # ᾱ
    sigma: Tensor  # √(1/ᾱ − 1)
    progress: Tensor  # fraction of the steps done at the middle of this one, above 0 (noise) and below 1 (image)


class Rule(nn.Module, ABC):
    """Base class of rules, which combine two predictions: ``rule(x0_cond, x0_uncond, level, state) -> x0``.

    Examples:
        >>> class Mean(Rule):  # a rule of your own
        ...     def forward(self, x0_cond, x0_uncond, level, state):
        ...         return (x0_cond + x0_uncond) / 2
        >>> from calib_guidance.denoisers import Combination, GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> x_t, y = torch.zeros(1, 1, 1, 1), torch.tensor([1])  # of pure noise, between both means
        >>> round(float(Combination(model, Mean())(x_t, 999, y).x0), 1)
        1.0
    """

    renoises_with_negative: bool = False  # whether the noise of a step is that of the negative prediction (CFG++)
    looks_at_steps: bool = False  # whether after_step does anything

    @abstractmethod
    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        """Combined x̂0 of two ``(N, C, H, W)``, not clipped; ``state`` has detached tensors ``(N, …)`` that the rule keeps from
        evaluation to evaluation of one trajectory.
        """

    def start(self, levels: NoiseLevels, y: Tensor) -> dict[str, Tensor]:
        """State of ``(N,)`` samples ``y`` at the start of a trajectory through these levels; none by default."""
        return {}

    def after_step(self, level: Level, state: dict[str, Tensor]) -> None:
        """Update the state by where a step ended: at ``level.x_t``."""


class ConvertedRule(Rule):
    """A rule whose result depends on what it combines: ``x0`` x̂0, ``epsilon`` ε, or ``v`` the velocity ε − x0 of flow models.

    Both predictions are converted to it, combined there, and the result is converted back, whatever the network predicts.

    Examples:
        >>> class Double(ConvertedRule):  # doubles what the two differ by
        ...     def combine(self, cond, uncond, state):
        ...         return uncond + 2 * (cond - uncond)
        >>> level = Level(torch.ones(1, 1, 1, 1), *torch.tensor([500.0, 0.5, 1.0, 0.5]))
        >>> cond, uncond = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
        >>> [round(float(Double(2.0, of)(cond, uncond, level, {})), 4) for of in ("x0", "epsilon", "v")]  # as it is linear
        [3.0, 3.0, 3.0]
    """

    def __init__(self, weight: float, representation: Representation):
        super().__init__()
        check_numbers(weight=weight)
        check_choice("representation", representation, get_args(Representation))
        self.weight = weight
        self.representation: Representation = representation

    @abstractmethod
    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The combined prediction ``(N, C, H, W)`` of two in the representation ``representation``."""

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        cond, uncond = (from_x0(x0, level, self.representation) for x0 in (x0_cond, x0_uncond))
        return to_x0(self.combine(cond, uncond, state), level, self.representation)


def from_x0(x0: Tensor, level: Level, representation: Representation) -> Tensor:
    """x̂0 as x̂0, ε = (x_t − √ᾱ·x̂0)/√(1−ᾱ) or v = ε − x̂0."""
    if representation == "x0":
        return x0
    signal, noise = _amplitudes(level)
    epsilon = (level.x_t - signal * x0) / noise
    return epsilon if representation == "epsilon" else epsilon - x0


def to_x0(value: Tensor, level: Level, representation: Representation) -> Tensor:
    """The inverse of :func:`from_x0`."""
    if representation == "x0":
        return value
    signal, noise = _amplitudes(level)
    return (level.x_t - noise * value) / (signal if representation == "epsilon" else signal + noise)


def _amplitudes(level: Level) -> tuple[Tensor, Tensor]:
    """√ᾱ, and √(1−ᾱ) from σ, without the rounding of 1 − ᾱ."""
    return level.alphas_cumprod.sqrt(), (1 + level.sigma**-2) ** -0.5


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, ``(N, 1, 1, 1)``, summed in float64."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)


def norm(a: Tensor) -> Tensor:
    """‖a‖ of each sample, ``(N, 1, 1, 1)``, summed in float64; never 0, where it has no gradient."""
    return inner(a, a).clamp(min=1e-300).sqrt()


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), 0)
