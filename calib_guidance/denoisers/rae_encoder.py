"""The encoder of representation autoencoders: latents are the tokens of DINOv2 with registers (arXiv 2510.11690)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.denoisers.rae import IMAGENET_MEAN, IMAGENET_STD, attend, depth_of, register_statistics
from calib_guidance.errors import CheckpointError
from calib_guidance.weights.io import Weights, load_weights, read_weights


class _Layer(nn.Module):
    """A layer of DINOv2, by the names of transformers."""

    attention: Any

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        parts = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"attention": nn.ModuleDict(parts), "output": nn.ModuleDict({"dense": nn.Linear(width, width)})}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_scale1, self.layer_scale2 = (
            nn.ParameterDict({"lambda1": nn.Parameter(torch.ones(width))}) for _ in "12"
        )

    def forward(self, x: Tensor) -> Tensor:
        y, inner = self.norm1(x), self.attention["attention"]
        out = self.attention["output"]["dense"]
        out = attend(y, self.heads, inner["query"], inner["key"], inner["value"], out)
        x = x + out * self.layer_scale1["lambda1"]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.layer_scale2["lambda1"]


class RAEEncoder(nn.Module):
    """Encoder of representation autoencoders (RAE).

    Images ``(N, 3, H, W)`` in [-1, 1] to RAE's latents ``(N, C, h, w)``, normalized at every position.

    For what is trained on the latents, such as a linear probe that guides without a decoder
    (``ClassifierGuidance(decoder=torch.nn.Identity())``).

    Args:
        checkpoint: folder or file of DINOv2 with registers, such as ``hf://facebook/dinov2-with-registers-base``.
        statistics: ``stat.pt`` with ``mean`` and ``var`` of the latents; None takes 0 and 1.
        image_size: side that images are resized to: 224 for the models of 256×256, 448 for those of 512×512.
        num_heads: attention heads, 12 of the base model.
        image_mean, image_std: of the pixels in [0, 1], ImageNet's.
        eps: of the layer norms.
    """

    latent_mean: Tensor
    latent_std: Tensor
    image_mean: Tensor
    image_std: Tensor
    encoder: Any

    def __init__(
        self,
        checkpoint: str,
        statistics: str | None = None,
        image_size: int = 224,
        num_heads: int = 12,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        eps: float = 1e-6,
    ):
        super().__init__()
        weights = read_weights(checkpoint)
        # The affine parameters of the last norm are not used, nor is the token of masked training.
        drop = ("layernorm.", "embeddings.mask_token")
        state = {name: value for name, value in weights.state.items() if not name.startswith(drop)}
        if "embeddings.register_tokens" not in state:
            raise CheckpointError(f"{checkpoint}: expected DINOv2 with registers, with embeddings.register_tokens")
        width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
        hidden = len(state["encoder.layer.0.mlp.fc1.weight"])
        depth = depth_of(state, "encoder.layer")
        self.image_size, self.patch, self.eps = image_size, patch, eps
        self.embeddings: Any = nn.Module()
        for name in ("cls_token", "register_tokens", "position_embeddings"):
            setattr(self.embeddings, name, nn.Parameter(torch.empty_like(state[f"embeddings.{name}"])))
        self.embeddings.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, patch)})
        layers = nn.ModuleList([_Layer(width, hidden, num_heads, eps) for _ in range(depth)])
        self.encoder = nn.ModuleDict({"layer": layers})
        load_weights(self, Weights(weights.path, state))
        register_statistics(self, statistics, image_mean, image_std)
        self.eval().requires_grad_(False)

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens of the patches ``(N, h·w, C)`` of images in [0, 1], under a norm without parameters."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bicubic", align_corners=False)
        x = self.embeddings.patch_embeddings["projection"]((images - self.image_mean) / self.image_std)
        grid, x = x.shape[-2:], x.flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(grid)
        registers = self.embeddings.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return F.layer_norm(x[:, 1 + registers.shape[1] :], x.shape[-1:], eps=self.eps)

    def _positions(self, grid: torch.Size) -> Tensor:
        """The table of positions, resized to the grid of patches."""
        table = self.embeddings.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        z = self.tokens((images + 1) / 2).transpose(1, 2)
        side = self.image_size // self.patch
        return (z.unflatten(2, (side, side)) - self.latent_mean) / self.latent_std
