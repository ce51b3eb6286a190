"""Temperature scaling, the post-hoc calibration that every other one is compared with (Guo et al. 2017)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BOUNDS = (0.05, 20.0)


def fit_temperature(
    logits: Tensor,
    y: Tensor,
    level: Tensor | None = None,
    num_levels: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """The temperatures that minimize the negative log-likelihood of held-out data, by L-BFGS on log T.

    Args:
        logits: ``(N, K)`` at temperature 1; rows that are not finite are skipped.
        y: ``(N,)`` true classes.
        level: ``(N,)`` noise level of each, in 0 … num_levels − 1; None puts all in level 0.
        reduce: sums a ``(num_levels + 1,)`` tensor over ranks, where each holds a part of the data.

    Returns:
        ``(num_levels,)`` float64 in BOUNDS; 1 for a level without data.
    """
    finite = logits.isfinite().all(1)
    logits, y = logits[finite].double(), y.to(logits.device)[finite]
    level = torch.zeros_like(y) if level is None else level.to(logits.device)[finite]
    counts = torch.zeros(num_levels + 1, dtype=torch.float64)
    counts[:num_levels] = torch.bincount(level, minlength=num_levels).double().cpu()
    counts = reduce(counts)[:num_levels].cpu()
    # Every level weighs the same, however many samples it has: the problems are separate and this keeps them equally scaled.
    weight = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0).to(logits.device)
    log_temperature = torch.zeros(num_levels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        local = log_temperature.detach().to(logits.device).requires_grad_()
        losses = F.cross_entropy(logits / local.exp()[level].unsqueeze(1), y, reduction="none")
        loss = (losses * weight[level]).sum()
        (gradient,) = torch.autograd.grad(loss, local)
        sums = reduce(torch.cat([gradient, loss.detach().unsqueeze(0)]).cpu()).cpu()
        log_temperature.grad = sums[:-1]
        return float(sums[-1])

    with torch.enable_grad():
        optimizer.step(closure)
    return log_temperature.detach().exp().clamp(*BOUNDS)
