"""Names of EDM2's weights, and what they tell of the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BLOCK = re.compile(r"enc\.(\d+)x\1_(conv|down|block)(\d*)\.")
# Arguments of the published networks that shapes do not tell, by the names of their constructor.
_ARGUMENTS = (
    "channels_per_head",
    "label_balance",
    "concat_balance",
    "res_balance",
    "attn_balance",
    "clip_act",
    "dropout",
)


def is_edm2(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of EDM2, those of the file or those here."""
    return {"emb_fourier.freqs", "emb_noise.weight", "out_gain"} <= {name.removeprefix("unet.") for name in state}


def from_edm2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~calib_guidance.networks.EDM2UNet` from those of a published file."""
    return {name.removeprefix("unet."): value for name, value in state.items()}


def edm2_architecture(state: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the :class:`~calib_guidance.networks.EDM2UNet` of weights by its names, all but dtype.

    ``made_with`` are the arguments that a pickle says its network was made with.
    """
    blocks = [(int(m[1]), m[2], int(m[3] or 0)) for m in map(_BLOCK.match, state) if m]
    resolutions = sorted({r for r, _, _ in blocks}, reverse=True)
    size = resolutions[0]
    first = {r: f"enc.{r}x{r}_block0" for r in resolutions}
    if any(f"{name}.conv_res1.weight" not in state for name in first.values()):
        raise ValueError("these are not the weights of EDM2's network: blocks are missing")
    widths = [len(state[f"{first[r]}.conv_res1.weight"]) for r in resolutions]
    label = state.get("emb_label.weight")
    return {
        "image_size": size,
        "in_channels": state[f"enc.{size}x{size}_conv.weight"].shape[1] - 1,
        "num_classes": None if label is None else label.shape[1],
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_blocks": len({n for r, kind, n in blocks if r == size and kind == "block"}),
        "attn_resolutions": tuple(r for r in resolutions if f"{first[r]}.attn_qkv.weight" in state),
        "logvar_channels": len(state["logvar_fourier.freqs"]),
    } | {name: made_with[name] for name in _ARGUMENTS if name in made_with}
