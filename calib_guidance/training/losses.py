"""Losses: smooth expected calibration error of classifiers, and the variational bound of diffusion models.

Smooth ECE pulls confidence towards accuracy (arXiv 2511.05844 Eq. 1); the bound is that of Ho et al. 2020 and Nichol & Dhariwal
2021 ("Improved DDPM").
"""

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor


def smooth_ece(logits: Tensor, y: Tensor, beta: float = 1e-2) -> Tensor:
    """Smooth ECE per sample.

    Mean of √((p̂ − a)² + β) over samples, a smooth form of |p̂ − a|.

    It is not proper: an absolute value is least at the median, not at the mean. Where a fraction q > ½ of predictions is right,
    the loss alone is least at p̂ ≈ 1 − √β·(1 − q)/√(2q − 1) for small β (0.95 where q = 0.7 and β = 0.01), which is
    over-confident, and at p̂ ≈ q + q(1 − q)(2q − 1)/(2β) for large β. Beside cross-entropy it raises confidence above q, by less.

    Args:
        logits: ``(N, K)``; half precision is computed in float32.
        y: ``(N,)`` true classes.
        beta: smoothing, > 0; the loss lies in [√β, √(1 + β)].

    Returns:
        Scalar. p̂ is the largest softmax probability; a, whether its class is the true one, is a constant to the gradient.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> round(float(smooth_ece(logits, torch.tensor([0, 1]), beta=1e-8)), 4)  # (0.2 + 0.8) / 2
        0.5
    """
    confidence, correct = _confidence(logits, y, beta)
    return ((confidence - correct).square() + beta).sqrt().mean()


def equal_width_bin(probability: Tensor, num_bins: int) -> Tensor:
    """Index of the bin (b/B, (b+1)/B] of each probability, int64 of the same shape."""
    # Compared with the edges: a product such as 0.28·25 can round up past an integer, which is one bin too high.
    return torch.bucketize(probability, _edges(num_bins, probability.dtype, probability.device))


@functools.lru_cache(maxsize=8)
def _edges(num_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inner edges of the bins: made once, not at every step."""
    with torch.inference_mode(False):  # tensors of inference mode could not be part of a gradient later
        return torch.arange(1, num_bins, dtype=dtype, device=device) / num_bins


def binned_smooth_ece(logits: Tensor, y: Tensor, beta: float = 1e-2, num_bins: int = 15) -> Tensor:
    """Binned Smooth ECE.

    Σ_b n_b/n·√((mean p̂ − mean a in bin b)² + β), which goes to the ECE of the batch as β → 0.

    Bin b is (b/B, (b+1)/B] of confidence. A bin of many samples pulls its mean confidence to its accuracy q. A bin of one is a
    term of :func:`smooth_ece`, with the same pull past q, so batches should fill their bins. Where torch.distributed is
    initialized the bins are those of the batches of all ranks, and every rank must call this equally often.

    Args:
        logits, y, beta: see :func:`smooth_ece`; N may differ between ranks.
        num_bins: number of bins B.

    Returns:
        Scalar, the same on every rank. The bin of a sample and a are constants to the gradient.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> round(float(binned_smooth_ece(logits, torch.tensor([0, 1]), beta=1e-8)), 4)  # 0.8 of one half
        0.3
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    confidence, correct = _confidence(logits, y, beta)
    # In float64, as the metric sorts and adds: a rounding must not decide about a bin or depend on the number of ranks.
    p = confidence.double()
    bins = equal_width_bin(p.detach(), num_bins)
    values = torch.stack([torch.ones_like(p), p, correct.double()], dim=1)
    sums = values.new_zeros(num_bins, 3).index_add(0, bins, values)
    if dist.is_available() and dist.is_initialized():
        # The loss is a function of the summed confidences C = Σ_r C_r, so its gradient is Σ_r ∂loss/∂C · ∂C_r, one term a
        # rank. DDP takes the mean of the ranks' gradients; each must therefore be its term times the number of ranks. The
        # collective itself carries no gradient, hence a detached copy.
        total = sums.detach().clone()
        dist.all_reduce(total)
        sums = total + dist.get_world_size() * (sums - sums.detach())
    count, confident, right = sums.unbind(1)
    gap = (confident - right) / count.clamp(min=1)  # an empty bin has no gap, and no weight
    return (count / count.sum() * (gap.square() + beta).sqrt()).sum().to(confidence.dtype)


def _confidence(logits: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """p̂ and a, both ``(N,)``, in float32 or better."""
    if not beta > 0:
        raise ValueError(f"beta (β) must be above 0, got {beta}")
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    confidence, prediction = probabilities.max(dim=1)
    return confidence, (prediction == y).to(confidence.dtype)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) of independent normals, elementwise, in nats."""
    ratio, distance = torch.exp(log_variance1 - log_variance2), (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1.0 + ratio + distance)


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood, elementwise and in nats, of 8-bit images scaled to [-1, 1] under a rounded normal."""
    inverse_std = torch.exp(-0.5 * log_variance)

    def cdf(z: Tensor) -> Tensor:
        return torch.special.ndtr(z * inverse_std)

    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x - mean + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - mean - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log()


def variational_bound_term(
    x0: Tensor, true_mean: Tensor, true_log_variance: Tensor, mean: Tensor, log_variance: Tensor, is_first_step: Tensor
) -> Tensor:
    """One term of the variational bound per sample, in bits per dimension.

    Images and moments are ``(N, C, H, W)``, to which true_log_variance broadcasts. Where ``is_first_step`` ``(N,)``, the term is
    the decoder's likelihood instead of a divergence.
    """
    divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    likelihood = discretized_gaussian_nll(x0, mean, log_variance).flatten(1).mean(1)
    return torch.where(is_first_step, likelihood, divergence) / math.log(2)
