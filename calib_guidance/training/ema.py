"""Post-hoc averages of weights (Karras et al. 2024, arXiv 2312.02696, Section 3; ``calib-guidance ema``).

A power-function average at time T (images seen) weights the weights at time t by t^γ. Two of them, snapshotted during training,
give any other afterwards, by least squares over their profiles. A length is given as s = std/T of the profile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.weights.io import in_half, read_weights, save_weights

RELIABLE = (
    0.03,
    0.25,
)  # from snapshots of 0.05 and 0.10; outside of it coefficients are large, or it cannot be reached
STD, IMAGES = "ema_std", "ema_images"  # what a snapshot's file says of itself


def exponent_of_std(std: float) -> float:
    """γ of a relative length s: the largest root of γ³ + 7γ² + (16 − 1/s²)γ + 12 − 1/s²."""
    if not 0 < std < 1 / np.sqrt(12):
        raise ValueError(f"std must lie above 0 and below 0.289, that of a plain mean, got {std}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def std_of_exponent(exponent: float) -> float:
    """s = √((γ + 1)/((γ + 2)²·(γ + 3)))."""
    return float(np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))))


def decay(std: float, images: int, batch_size: int) -> float:
    """β of θ̄ ← β·θ̄ + (1 − β)·θ after a batch, ``images`` with it; 0 after the first, so that the start is forgotten."""
    return (1 - batch_size / images) ** (exponent_of_std(std) + 1)


def _inner(gamma_a: np.ndarray, time_a: np.ndarray, gamma_b: np.ndarray, time_b: np.ndarray) -> np.ndarray:
    """∫ of the product of two normalized profiles."""
    smaller = np.where(time_a < time_b, gamma_b, -gamma_a)
    with np.errstate(over="ignore"):
        ratio = np.exp(smaller * np.log(time_a / time_b))
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(time_a, time_b))


def gram_matrix(stds: Sequence[float], images: Sequence[float]) -> np.ndarray:
    """Inner products of the profiles of snapshots, ``(N, N)`` float64."""
    gamma = np.array([exponent_of_std(std) for std in stds])
    time = np.asarray(images, np.float64)
    return _inner(gamma[:, None], time[:, None], gamma[None], time[None])


def coefficients(stds: Sequence[float], images: Sequence[float], std: float, at: float | None = None) -> np.ndarray:
    """Weights of snapshots whose sum is the average of length ``std`` at time ``at``; ``(N,)`` float64, of sum 1.

    Args:
        stds, images: ``(N,)`` length and time of each snapshot.
        std: length that is asked for.
        at: its time, that of a snapshot; later snapshots get 0. None is the last.
    """
    time = np.asarray(images, np.float64)
    at = float(time.max() if at is None else at)
    if at not in time:
        raise ValueError(
            f"there is no snapshot at {at:g} images: take one of {', '.join(f'{t:g}' for t in sorted({*time}))}"
        )
    used = time <= at
    gamma = np.array([exponent_of_std(s) for s in stds])[used]
    wanted = _inner(gamma, time[used], np.float64(exponent_of_std(std)), np.float64(at))
    solution = np.linalg.solve(gram_matrix(np.asarray(stds)[used], time[used]), wanted)
    full = np.zeros(len(time))
    full[used] = solution / solution.sum()
    return full


class Snapshot(NamedTuple):
    """An average on disk.

    Attributes:
        path: its file.
        std: relative length s.
        images: time T.
    """

    path: Path
    std: float
    images: int


def find_snapshots(folder: str | Path) -> list[Snapshot]:
    """The snapshots in a folder, as :class:`~calib_guidance.callbacks.PostHocEMA` writes them, in order of time."""
    from safetensors import safe_open

    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if STD in metadata:
            found.append(Snapshot(path, float(metadata[STD]), int(metadata[IMAGES])))
    if not found:
        raise CheckpointError(f"{folder}: no snapshots, which the callback PostHocEMA writes in fit")
    return sorted(found, key=lambda snapshot: (snapshot.images, snapshot.std))


def reconstruct(
    snapshots: Iterable[Snapshot], std: float, at: float | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The average of length ``std`` from snapshots, summed in float32, and its metadata.

    Tensors that are not averaged (integers) are those of the last snapshot.
    """
    snapshots = list(snapshots)
    weights = coefficients([s.std for s in snapshots], [s.images for s in snapshots], std, at)
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        if not weight:
            continue
        read = read_weights(snapshot.path)
        if total and {n: v.shape for n, v in total.items()} != {n: v.shape for n, v in read.state.items()}:
            raise CheckpointError(f"{snapshot.path} has other names or shapes than the snapshots before it")
        for name, value in read.state.items():
            if value.is_floating_point():
                value = value.float() * weight + total.get(name, 0.0)
            total[name] = value
        metadata, last = dict(read.metadata), snapshot.images
    return total, metadata | {STD: f"{std:g}", IMAGES: str(last)}


def relative_difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖a − b‖/‖b‖ over all floating-point tensors of two states with the same names."""
    names = [name for name, value in other.items() if value.is_floating_point()]
    apart, size = (
        sum(float(value.double().square().sum()) for value in values)
        for values in ((state[n].double() - other[n].double() for n in names), (other[n] for n in names))
    )
    return (apart / size) ** 0.5


def ema(argv: Sequence[str]) -> None:
    """``calib-guidance ema``, of the arguments after ``ema``: see its ``--help``."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance ema",
        description="Weights averaged over a length chosen after training (EDM2's post-hoc EMA), from the snapshots that the "
        "callback PostHocEMA wrote in fit.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="with the snapshots")
    parser.add_argument("--std", type=float, required=True, help="length relative to training, such as 0.08")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="to write")
    parser.add_argument("--images", type=int, help="end of the average, the time of a snapshot; the last by default")
    parser.add_argument("--half", action="store_true", help="write float16 in place of float32")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE.safetensors",
        help="print the relative difference to these weights, such as an average that was kept in training",
    )
    options = parser.parse_args(list(argv))
    if options.output.suffix != ".safetensors":
        raise ConfigurationError(f"--output must end in .safetensors, got {options.output}")
    snapshots = find_snapshots(options.folder)
    try:
        state, metadata = reconstruct(snapshots, options.std, options.images)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    compared = None
    if options.compare is not None:
        compared = read_weights(options.compare).state
        if {name: value.shape for name, value in compared.items()} != {n: v.shape for n, v in state.items()}:
            raise CheckpointError(f"--compare: {options.compare} has other names or shapes than the snapshots")
    if not RELIABLE[0] <= options.std <= RELIABLE[1]:
        print(f"note: lengths outside {RELIABLE[0]} … {RELIABLE[1]} are not reliable from snapshots of 0.05 and 0.10")
    if options.half:
        state = in_half(state, options.output)
    save_weights(state, options.output, **metadata)
    print(
        f"wrote {options.output}: length {options.std:g} at {metadata[IMAGES]} images, from {len(snapshots)} snapshots"
    )
    if compared is not None:
        print(f"relative difference to {options.compare}: {relative_difference(state, compared):.2e}")


@torch.no_grad()
def update(average: dict[str, Tensor], state: dict[str, Tensor], beta: float) -> None:
    """θ̄ ← β·θ̄ + (1 − β)·θ in place; what is not a float is copied."""
    for name, value in state.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - beta)
        else:
            average[name].copy_(value)
