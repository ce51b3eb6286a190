"""Names of DiT's weights: as published with the paper, in diffusers, and here."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calib_guidance.errors import CheckpointError
from calib_guidance.networks.dit import DiT

# Width, depth and heads of the paper's sizes.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
# (official, here). Attention's query, key and value lie in one tensor in the official files.
_OFFICIAL = [
    (r"pos_embed", "transformer.pos_embed.pos_embed"),
    (r"x_embedder\.proj\.(\w+)", r"transformer.pos_embed.proj.\1"),
    (r"t_embedder\.mlp\.(0|2)\.(\w+)", r"time_embed.\1.\2"),
    (r"y_embedder\.embedding_table\.weight", "label_emb.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"transformer.transformer_blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.attn\.(q|k)_norm\.(\w+)", r"transformer.transformer_blocks.\1.attn1.norm_\2.\3"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.transformer_blocks.\1.ff.net.0.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.transformer_blocks.\1.ff.net.2.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"transformer.transformer_blocks.\1.norm1.linear.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(\w+)", r"transformer.proj_out_1.\1"),
    (r"final_layer\.linear\.(\w+)", r"transformer.proj_out_2.\1"),
]
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(\w+)")
_COPIES = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")
_EMBEDDERS = {"class_embedder.embedding_table.weight": "label_emb.weight"} | {
    f"timestep_embedder.linear_{there}.{kind}": f"time_embed.{here}.{kind}"
    for there, here in ((1, 0), (2, 2))
    for kind in ("weight", "bias")
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~calib_guidance.networks.dit.DiT` from those of an official ``.pt`` file."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := _QKV.fullmatch(name):
            prefix = f"transformer.transformer_blocks.{match[1]}.attn1"
            found |= {f"{prefix}.to_{c}.{match[2]}": v for c, v in zip("qkv", value.chunk(3), strict=True)}
            continue
        for pattern, here in _OFFICIAL:
            if match := re.fullmatch(pattern, name):
                name = match.expand(here)
                break
        found[name] = value  # a name that is not known stays, and is then refused as unexpected
    return found


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~calib_guidance.networks.dit.DiT` from those of diffusers' ``DiTTransformer2DModel``."""
    found = {}
    for name, value in state.items():
        match = _COPIES.fullmatch(name)
        if not match:
            found[f"transformer.{name}"] = value
        elif match[1] == "0":
            found[_EMBEDDERS.get(match[2], name)] = value
        elif not torch.equal(value, state.get(f"transformer_blocks.0.norm1.emb.{match[2]}", value.new_empty(0))):
            raise CheckpointError(
                f"{name} differs from that of block 0: in DiT all blocks share one embedder: not a DiT file"
            )
    return found


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`from_diffusers`, less the table of positions, which diffusers computes."""
    inner = {n.removeprefix("transformer."): v for n, v in state.items() if n.startswith("transformer.")}
    inner.pop("pos_embed.pos_embed", None)
    for block in {n.split(".")[1] for n in inner if n.startswith("transformer_blocks.")}:
        inner |= {f"transformer_blocks.{block}.norm1.emb.{there}": state[here] for there, here in _EMBEDDERS.items()}
    return inner


def to_dit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~calib_guidance.networks.dit.DiT` from those of any of the three layouts, told by their names."""
    if "x_embedder.proj.weight" in state:
        return from_official(state)
    return from_diffusers(state) if "pos_embed.proj.weight" in state else dict(state)


def named_dit(name: str, dtype: str | None = None) -> DiT:
    """An architecture of the paper: ``dit_{s,b,l,xl}_{2,4,8}_{256,512}``: size, patch, image side in pixels."""
    match = re.fullmatch(r"dit_(s|b|l|xl)_(2|4|8)_(256|512)", name)
    if not match:
        raise ValueError(f"network: unknown {name!r}; expected dit_SIZE_PATCH_IMAGE such as dit_xl_2_256")
    width, depth, heads = _SIZES[match[1]]
    return DiT(int(match[3]) // 8, int(match[2]), width, depth, heads, dtype=dtype or "float32")


def described_dit(config: Mapping[str, Any], dtype: str | None = None) -> DiT:
    """The network that a diffusers folder's ``config.json`` describes."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    names = "num_layers", "num_attention_heads", "in_channels", "out_channels", "num_embeds_ada_norm"
    others = (config[name] for name in names)
    return DiT(config["sample_size"], config["patch_size"], width, *others, dtype=dtype or "float32")
