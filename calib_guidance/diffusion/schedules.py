"""Discrete noise schedules of DDPM and their respacing (Ho et al. 2020; Nichol & Dhariwal 2021)."""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from calib_guidance.errors import check_choice

ScheduleName = Literal["linear", "cosine"]
# σ from which x_t is pure noise: of infinite σ, to compute with. Nothing there tells classes apart.
PURE_NOISE = 1e6


def named_betas(name: str, num_steps: int = 1000) -> np.ndarray:
    """β of the forward process, ``(num_steps,)`` float64.

    ``linear`` runs from 1e-4 to 0.02 (times 1000/num_steps); ``cosine`` follows ᾱ(u) = cos²((u + 0.008)/1.008·π/2), β ≤ 0.999.

    Examples:
        >>> betas = named_betas("linear")
        >>> len(betas), float(betas[0]), float(betas[-1])
        (1000, 0.0001, 0.02)
    """
    check_choice("noise schedule", name, get_args(ScheduleName))
    if name == "linear":
        scale = 1000 / num_steps
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)

    def alphas_cumprod(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_steps)
    return np.array(
        [min(1 - alphas_cumprod((i + 1) / num_steps) / alphas_cumprod(i / num_steps), 0.999) for i in steps]
    )


def respaced_timesteps(num_steps: int, respacing: str | int) -> np.ndarray:
    """Which of ``num_steps`` steps a shorter process uses, ascending.

    Args:
        num_steps: of the full process.
        respacing: ``"250"`` spreads 250 steps from the first to the last; ``"10,10,5"`` cuts the process in equal
            sections with so many steps each (0 skips a section); ``"ddim25"`` strides by the first integer that gives 25
            steps, from 0, or with ``"ddim25+1"`` from 1, as Stable Diffusion does; ``"trailing25"`` strides down from the
            last step, as processes that end in pure noise need (Lin et al. 2024).

    Examples:
        >>> respaced_timesteps(1000, "5").tolist()
        [0, 250, 500, 749, 999]
        >>> respaced_timesteps(1000, "ddim4").tolist()
        [0, 250, 500, 750]
        >>> respaced_timesteps(1000, "trailing4").tolist()
        [249, 499, 749, 999]
    """
    text = str(respacing).replace(" ", "")
    if match := re.fullmatch(r"ddim(\d+)(?:\+(\d+))?", text):
        count, offset = int(match[1]), int(match[2] or 0)
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == count and offset < stride:
                return np.minimum(np.arange(0, num_steps, stride) + offset, num_steps - 1)
        raise ValueError(f"steps: no integer stride over {num_steps} steps gives {count} of them ({respacing!r})")
    if (match := re.fullmatch(r"trailing(\d+)", text)) and 1 <= int(match[1]) <= num_steps:
        return np.round(np.arange(num_steps, 0, -num_steps / int(match[1]))).astype(int)[::-1] - 1
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(
            f"steps: expected something like '250', '10,10,5', 'ddim25' or 'trailing25', at most {num_steps}, got {respacing!r}"
        )
    counts = [int(c) for c in text.split(",")]
    base, extra = divmod(num_steps, len(counts))
    used, start = [], 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if count > size:
            raise ValueError(f"steps: cannot take {count} of the {size} steps of section {section + 1} ({respacing!r})")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The position is accumulated in floating point and rounded half to even, as the published models were sampled.
        position = 0.0
        for _ in range(count):
            used.append(start + round(position))
            position += stride
        start += size
    if not used:
        raise ValueError(f"steps: at least one step is needed, got {respacing!r}")
    return np.array(used)


class NoiseLevels(NamedTuple):
    """The noise levels that one trajectory passes, least noisy first, ``(N,)`` each.

    Examples:
        >>> levels = NoiseSchedule(np.array([0.5, 0.5])).levels
        >>> levels.alphas_cumprod, levels.sigmas.round(4)  # ᾱ = 1/(1 + σ²)
        (array([0.5 , 0.25]), array([1.    , 1.7321]))
    """

    times: np.ndarray  # float64, t on the 0 … T − 1 scale of the full process, or between two of its steps
    alphas_cumprod: np.ndarray  # float64, ᾱ
    progress: np.ndarray  # where the sine schedule is, as a fraction of π: i/N for DDPM
    executed: np.ndarray  # steps done before
    start: np.ndarray  # index of the level at which the step starts: its own, unless a step evaluates at several
    num_train_steps: int  # T

    @property
    def sigmas(self) -> np.ndarray:
        """σ = √(1/ᾱ − 1), the noise of x_t/√ᾱ = x0 + σ·ε (Karras et al. 2022)."""
        with np.errstate(divide="ignore"):  # infinite at pure noise
            return np.sqrt(1 / self.alphas_cumprod - 1)

    def select(self, rows: Sequence[int]) -> "NoiseLevels":
        """Some of these levels, in the order given."""
        times, alphas_cumprod, progress, executed = (np.asarray(table)[rows] for table in self[:4])
        return NoiseLevels(times, alphas_cumprod, progress, executed, np.arange(len(rows)), self.num_train_steps)


def _levels(times: np.ndarray, alphas_cumprod: np.ndarray, num_train_steps: int) -> NoiseLevels:
    """Levels that are passed one after the other, the last one first."""
    i = np.arange(len(times))
    return NoiseLevels(np.asarray(times, np.float64), alphas_cumprod, i / len(i), i[::-1], i, num_train_steps)


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) by step, Ho et al. 2020 Eq. 7; ``(N,)`` float64 each.

    The variance β̃ is 0 at entry 0, where its clipped log is that of entry 1; ``mean_coef1`` and ``mean_coef2`` weigh x_0 and x_t.
    """

    betas: np.ndarray
    variance: np.ndarray
    log_variance_clipped: np.ndarray
    mean_coef1: np.ndarray
    mean_coef2: np.ndarray


def posterior(alphas_cumprod: np.ndarray, betas: np.ndarray | None = None) -> Posterior:
    """The posterior of a process with these ᾱ ``(N,)``, the least noisy step first; β is 1 − ᾱ_i/ᾱ_{i−1} unless given."""
    previous, remaining = np.append(1.0, alphas_cumprod[:-1]), 1.0 - alphas_cumprod
    betas = 1.0 - alphas_cumprod / previous if betas is None else betas
    variance = betas * (1.0 - previous) / remaining
    clipped = variance.copy()
    clipped[0] = clipped[1] if len(clipped) > 1 else betas[0]
    mean_coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / remaining
    return Posterior(betas, variance, np.log(clipped), betas * np.sqrt(previous) / remaining, mean_coef2)


class NoiseSchedule:
    """Tables of a (respaced) discrete process, float64, index 0 the least noisy step.

    Args:
        betas: ``(T,)`` β of the full process.
        timesteps: ``(N,)`` ascending steps of the full process to keep; None keeps all.

    Attributes:
        num_train_steps: T.
        timesteps: ``(N,)`` what the network is given at each step.
        betas, alphas_cumprod: ``(N,)``.
        posterior: see :class:`Posterior`.

    Examples:
        >>> schedule = NoiseSchedule(named_betas("cosine"))
        >>> short = schedule.respace("5")
        >>> len(short), short.timesteps.tolist()
        (5, [0, 250, 500, 749, 999])
        >>> bool(short.alphas_cumprod[1] == schedule.alphas_cumprod[250])
        True
    """

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray | None = None):
        betas = np.asarray(betas, dtype=np.float64)
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"β must lie between 0 and 1 at every step of a noise schedule, got {betas.min():g} … {betas.max():g}: a linear "
                f"schedule needs at least 21 steps, this one has {len(betas)}; set num_steps, or noise_schedule to cosine"
            )
        full = np.cumprod(1.0 - betas)
        self.num_train_steps = len(full)
        self.timesteps = np.arange(len(full)) if timesteps is None else np.asarray(timesteps)
        kept = full[self.timesteps]
        self.betas = betas if timesteps is None else 1.0 - kept / np.append(1.0, kept[:-1])
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.posterior = posterior(self.alphas_cumprod, self.betas)

    def __len__(self) -> int:
        return len(self.timesteps)

    def respace(self, respacing: str | int) -> "NoiseSchedule":
        """The process that uses only the steps of ``respacing``, see :func:`respaced_timesteps`."""
        return NoiseSchedule(self.betas, respaced_timesteps(len(self), respacing))

    @property
    def levels(self) -> NoiseLevels:
        """All steps of this process."""
        return _levels(self.timesteps, self.alphas_cumprod, self.num_train_steps)

    def at(self, steps: Sequence[int] | np.ndarray) -> NoiseLevels:
        """Some steps of a process that is not respaced, in the order given."""
        steps = np.asarray(steps)
        return _levels(self.timesteps[steps], self.alphas_cumprod[steps], self.num_train_steps)

    def at_sigmas(self, sigmas: Sequence[float] | np.ndarray) -> NoiseLevels:
        """Levels of given σ > 0, in the order given.

        ᾱ = 1/(1 + σ²) is exact; t is interpolated in ln σ between the steps of this process, and stays within them.
        """
        sigmas = np.asarray(sigmas, np.float64)
        times = np.interp(np.log(sigmas), np.log(1 / self.alphas_cumprod - 1) / 2, self.timesteps)
        return _levels(times, 1 / (1 + np.square(sigmas)), self.num_train_steps)
