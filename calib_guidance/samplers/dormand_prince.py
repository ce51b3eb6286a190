"""An adaptive Runge–Kutta method of order 5 (Dormand & Prince 1980), as SciPy's ``RK45`` and torchdiffeq's ``dopri5`` have it."""

from collections.abc import Callable

import torch
from torch import Tensor

_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_RESULT = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)  # order 5 less order 4
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 10.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return torch.stack([w * k for w, k in zip(weights, slopes, strict=True) if w]).sum(0)


def _first_step(
    slope: Callable[[float, Tensor], Tensor], t: float, x: Tensor, k: Tensor, end: float, rtol: float, atol: float
) -> float:
    """Hairer, Nørsett & Wanner, Section II.4."""
    scale, direction = atol + x.abs() * rtol, 1.0 if end > t else -1.0
    d0, d1 = _rms(x / scale), _rms(k / scale)
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, abs(end - t))
    d2 = _rms((slope(t + direction * h0, x + direction * h0 * k) - k) / scale) / h0
    h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / 5)
    return min(100 * h0, h1, abs(end - t))


def dormand_prince(
    slope: Callable[[float, Tensor], Tensor],
    start: float,
    end: float,
    x: Tensor,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> Tensor:
    """x at ``end`` of dx/dt = ``slope(t, x)`` from ``x`` at ``start``.

    A step is accepted where the root mean square of its estimated error over atol + rtol·max(|x|, |x'|) is below 1. The mean is
    over the complete tensor: samples that are solved together share their steps.

    Examples:
        >>> x = dormand_prince(lambda t, x: -x, 0.0, 1.0, torch.ones(1, dtype=torch.float64), rtol=1e-8, atol=1e-8)
        >>> round(float(x) * 2.718281828, 6)
        1.0
    """
    t, k, direction = start, slope(start, x), 1.0 if end > start else -1.0
    h = _first_step(slope, t, x, k, end, rtol, atol)
    while t != end:
        rejected = False
        while True:
            h = max(h, 1e-12)
            t_next = t + direction * h
            t_next = end if direction * (t_next - end) > 0 else t_next
            step, slopes = t_next - t, [k]
            for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
                slopes.append(slope(t + node * step, x + step * _sum(weights, slopes)))
            x_next = x + step * _sum(_RESULT, slopes)
            slopes.append(slope(t_next, x_next))
            error = _rms(step * _sum(_ERROR, slopes) / (atol + torch.maximum(x.abs(), x_next.abs()) * rtol))
            if not error < float("inf"):
                raise ValueError(f"dopri5: the velocity is not finite near τ = {t_next:.4g}")
            factor = _MOST if error == 0 else _SAFETY * error ** (-1 / 5)
            h = abs(step) * (min(factor, 1.0 if rejected else _MOST) if error < 1 else max(factor, _LEAST))
            if error < 1:
                break
            rejected = True
        t, x, k = t_next, x_next, slopes[-1]
    return x
