"""The diffusion transformer (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748), through diffusers' blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib_guidance.backend import tuning
from calib_guidance.backend.precision import Dtype, dtype_of
from calib_guidance.errors import check_installed
from calib_guidance.networks.adm import timestep_embedding

_FREQUENCIES = 256


class _ReadyEmbedding(nn.Module):
    """Replaces the embedders in every block of diffusers: takes the ready embedding as the time."""

    def forward(self, timestep: Tensor, class_labels: None, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


class _Attention:
    """Self-attention with the arithmetic that is tuned for CPUs, in the form in which diffusers calls it."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: None, **kwargs: None) -> Tensor:
        n, tokens, _ = hidden_states.shape
        parts = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (part.view(n, tokens, attn.heads, -1).transpose(1, 2) for part in parts)
        q, k = (part if norm is None else norm(part) for norm, part in ((attn.norm_q, q), (attn.norm_k, k)))
        return attn.to_out[0](tuning.attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """A class-conditional diffusion transformer over latents.

    diffusers has time and class embedders in every block; here they are outside of them, computed once per trajectory. As DiT
    was trained, and unlike diffusers, the frequencies of the time embedding are 10000^(−k/128), and LayerNorms have ε = 1e-6.

    Args:
        sample_size: side of the latents.
        patch_size: side of a token, in latent pixels.
        hidden_size: width.
        depth: number of blocks.
        num_heads: attention heads.
        in_channels: of the latents.
        out_channels: twice ``in_channels`` where the variance is learned.
        num_classes: K; label K of the table is the null class of classifier-free guidance.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``, of the transformer; embeddings and output are float32.
        qk_norm: normalize queries and keys of each head (LayerNorm).

    Examples:
        >>> network = DiT(sample_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> network(torch.zeros(2, 4, 4, 4), torch.tensor([0, 999]), torch.tensor([3, 10])).shape  # 10: no class
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
        dtype: Dtype = "float32",
        qk_norm: bool = False,
    ):
        super().__init__()
        check_installed("diffusers", "diffusers", "DiT")
        from diffusers import DiTTransformer2DModel  # seconds to import, and only latent models need it

        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of num_heads ({num_heads}) and of 4, got {hidden_size}")
        if sample_size % patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size ({patch_size}), got {sample_size}")
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"out_channels must be in_channels or, with variance, twice; got {out_channels}")
        self.image_size, self.num_classes = sample_size, num_classes
        self.in_channels, self.out_channels = in_channels, out_channels
        # What a diffusers folder's config.json must agree with.
        self.architecture = {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "num_attention_heads": num_heads,
            "attention_head_dim": hidden_size // num_heads,
            "num_layers": depth,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_embeds_ada_norm": num_classes,
        }
        self.time_embed = nn.Sequential(
            nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.label_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.transformer = DiTTransformer2DModel(**self.architecture, norm_eps=1e-6)
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = _ReadyEmbedding()
            block.attn1.set_processor(_Attention())
            if qk_norm:
                block.attn1.norm_q, block.attn1.norm_k = (nn.LayerNorm(hidden_size // num_heads) for _ in "qk")
        # Official files carry the table of positions, so that it is a weight here too.
        positions = self.transformer.pos_embed
        positions.register_buffer("pos_embed", positions.pos_embed, persistent=True)
        nn.Module.to(self.transformer, dtype_of(dtype))  # its own `to` warns of types that it does not keep

    def initialize(self) -> None:
        """Weights to train from: every block starts as the identity, and the output is 0 (adaLN-Zero, Section 3.2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = module.weight.data.flatten(1)  # patches are embedded by a matrix, too
                modulates = name.endswith("norm1.linear") or ".proj_out_" in name
                if modulates:
                    nn.init.zeros_(weight)
                elif name.startswith("time_embed"):
                    nn.init.normal_(weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_emb.weight, std=0.02)

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError if latents of ``(C, H, W)`` do not fit the network."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(shape) != expected:
            raise ValueError(f"latents of {tuple(shape)} do not fit the network, which takes {expected}")

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time part of the embedding: ``(N,)`` on the 0 … 999 scale to ``(N, hidden_size)``."""
        return self.time_embed(timestep_embedding(timesteps, _FREQUENCIES).to(self.label_emb.weight.dtype))

    def embed_labels(self, y: Tensor) -> Tensor:
        """Class part of the embedding: ``(N,)`` to ``(N, hidden_size)``; a label of -1 is the null class."""
        return self.label_emb(torch.where(y < 0, self.num_classes, y))

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """The network on ``x`` ``(N, C, H, W)`` with a ready embedding ``(N, hidden_size)``."""
        weight = self.transformer.proj_out_2.weight
        (output,) = self.transformer(x.to(weight.dtype), emb.to(weight.dtype), return_dict=False)
        return output.to(emb.dtype)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Output ``(N, out_channels, H, W)``, noise then variance, for latents ``(N, C, H, W)`` at ``timesteps`` ``(N,)``;
        ``y`` are ``(N,)`` classes, -1 for none; None for all none.
        """
        y = torch.full_like(timesteps, -1, dtype=torch.long) if y is None else y
        return self.decode(x, self.embed_time(timesteps) + self.embed_labels(y))
