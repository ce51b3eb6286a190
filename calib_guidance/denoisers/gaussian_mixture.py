"""A Gaussian mixture: the diffusion model whose score and posterior are closed forms."""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Predict, Prediction
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule, ScheduleName, named_betas


class GaussianMixture(Denoiser):
    """Gaussian mixture with an exact denoiser.

    p(x0) = Σ_k w_k·N(μ_k, Σ_k), one component per class (the setting of arXiv 2310.11311, Proposition 4.2).

    Under noise it stays a mixture, of N(√ᾱ·μ_k, ᾱ·Σ_k + (1−ᾱ)·I), so that E[x0 | x_t], p_t(x_t), p_t(y | x_t) and all their
    gradients are exact.

    Args:
        means: K points of D numbers.
        covariances: K matrices D×D, positive definite, or K numbers σ² for σ²·I.
        weights: K positive weights, normalized here; equal by default.
        noise_schedule: ``linear`` or ``cosine``.
        num_steps: length of the diffusion process.
        class_conditional: false makes an unconditional model, which ignores labels.

    Samples have the shape ``(D, 1, 1)``.

    Examples:
        >>> model = GaussianMixture(means=[[-1.0], [3.0]], covariances=[0.01, 0.01])
        >>> prediction = model(torch.zeros(1, 1, 1, 1), 999, torch.tensor([0]))
        >>> round(float(prediction.x0), 1)  # of pure noise, the mean of all
        1.0
    """

    clip = False
    means: Tensor
    variances: Tensor
    axes: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        covariances: Sequence[float] | Sequence[Sequence[Sequence[float]]],
        weights: Sequence[float] | None = None,
        noise_schedule: ScheduleName = "linear",
        num_steps: int = 1000,
        class_conditional: bool = False,
    ):
        super().__init__()
        mu = torch.tensor(means, dtype=torch.float64)
        sigma = torch.tensor(covariances, dtype=torch.float64)
        if sigma.ndim == 1:
            sigma = sigma[:, None, None] * torch.eye(mu.shape[-1], dtype=torch.float64)
        w = torch.ones(len(mu), dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
        k, d = mu.shape
        if sigma.shape != (k, d, d) or w.shape != (k,):
            raise ValueError(f"{k} means of {d} numbers need {k} covariances and weights, got {sigma.shape}, {w.shape}")
        variances, axes = torch.linalg.eigh(sigma)
        if not torch.allclose(sigma, sigma.transpose(1, 2)):
            raise ValueError("covariances must be symmetric")
        if not (variances > 0).all() or not (w > 0).all():
            raise ValueError("covariances must be positive definite and weights positive")
        tables = {"means": mu, "variances": variances, "axes": axes, "log_weights": (w / w.sum()).log()}
        for name, value in tables.items():
            self.register_buffer(name, value, persistent=False)
        self.schedule = NoiseSchedule(named_betas(noise_schedule, num_steps))
        self.image_shape = (d, 1, 1)
        self.num_components, self.num_classes = k, k if class_conditional else None

    @property
    def max_sigma(self) -> float:
        return math.inf

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to a device and stays float64: a cast would round the closed forms."""
        return super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)

    def _components(self, x: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of w_k·p_t(x|k) ``(K, N)``, the deviations in each component's axes and their variances ``(K, D, N)``.

        Samples come last: sums over the few components and dimensions then run along memory.
        """
        alphas_cumprod = alphas_cumprod.view(-1)
        deviation = x.flatten(1).double().T - alphas_cumprod.sqrt() * self.means[..., None]
        rotated = self.axes.transpose(1, 2) @ deviation
        variances = alphas_cumprod * self.variances[..., None] + (1 - alphas_cumprod)
        log_density = -0.5 * (rotated.square() / variances + (2 * math.pi * variances).log()).sum(1)
        return self.log_weights[:, None] + log_density, rotated, variances

    def log_joint(self, x: Tensor, t: int | Tensor | None = None) -> Tensor:
        """log w_k·p_t(x | k), ``(N, K)`` float64, at step ``t`` (one, or one per sample ``(N,)``) or of clean ones (None)."""
        alphas_cumprod = torch.as_tensor(self.schedule.alphas_cumprod, device=self.means.device)
        return self._components(x, self.means.new_ones(()) if t is None else alphas_cumprod[t])[0].T.contiguous()

    def log_prob(self, x: Tensor, t: int | Tensor | None = None) -> Tensor:
        """log p_t(x), ``(N,)`` float64."""
        return self.log_joint(x, t).logsumexp(dim=1)

    def sample(self, n: int, y: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples ``(n, D, 1, 1)`` of the mixture, or of its class ``y`` (-1 and None are all classes)."""
        if y is None or y < 0:
            component = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        else:
            component = torch.full((n,), y, device=self.means.device)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64, device=self.means.device)
        x = self.means[component] + torch.einsum(
            "nij,nj->ni", self.axes[component], self.variances[component].sqrt() * z
        )
        return x[:, :, None, None].float()

    def posterior_mean(self, x_t: Tensor, alphas_cumprod: float | Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], or E[x0 | x_t, y] where y is a class (-1 is none), at one ᾱ or one per sample; ``(N, D, 1, 1)``."""
        alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device=x_t.device).view(-1)
        log_joint, rotated, variances = self._components(x_t, alphas_cumprod)
        gain = alphas_cumprod.sqrt() * self.variances[..., None] / variances
        means = self.means[..., None] + self.axes @ (gain * rotated)
        share = log_joint.softmax(dim=0)
        if y is not None:
            own = torch.nn.functional.one_hot(y.clamp(min=0), self.num_components).T.to(share)
            share = torch.where(y >= 0, own, share)
        return (share[:, None] * means).sum(0).T.reshape(x_t.shape).to(x_t.dtype)

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        alphas_cumprod = torch.as_tensor(levels.alphas_cumprod, device=self.means.device)
        labels = y if self.num_classes is not None else None
        return lambda x_t, i: Prediction(self.posterior_mean(x_t, alphas_cumprod[i], labels))
