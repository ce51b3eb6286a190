"""EDM's network (Karras et al. 2022, https://arxiv.org/abs/2206.00364) as the UNet of ADM.

EDM re-trained ADM's architecture under names of its own. What differs is the order of the qkv channels, labels that enter
as a linear map of one-hot vectors instead of a table, and the smallest normalization groups, so that the weights, renamed,
run in :class:`~calib_guidance.networks.UNet`. (EDM activates the embedding once, ADM in each block: the same function.)
"""

import re
from collections.abc import Mapping

from torch import Tensor

HEAD_CHANNELS = 64
MIN_GROUP_CHANNELS = 4
_RENAMED = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
# Of a layer of EDM's blocks: ADM's block, 0 the residual and 1 the attention, and the name in it.
_LAYERS = {
    "norm0": (0, "in_layers.0"),
    "conv0": (0, "in_layers.2"),
    "affine": (0, "emb_layers.1"),
    "norm1": (0, "out_layers.0"),
    "conv1": (0, "out_layers.3"),
    "skip": (0, "skip_connection"),
    "norm2": (1, "norm"),
    "qkv": (1, "qkv"),
    "proj": (1, "proj_out"),
}
_BLOCK = re.compile(r"(enc|dec)\.(\d+)x\2_(conv|down|up|in|block)(\d*)\.")


def is_edm(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of EDM's DhariwalUNet, alone or within its preconditioning (``model.``)."""
    return {"map_layer0.weight", "out_conv.weight"} <= {name.removeprefix("model.") for name in state}


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefix of the preconditioning and the constants."""
    weights = {}
    for name, value in state.items():
        if name.endswith("resample_filter"):
            if value.shape != (1, 1, 2, 2) or not (value == 0.25).all():
                raise ValueError(f"{name} is not the 2×2 box filter [1, 1], and ADM's networks have no other")
        # Augmentation labels are zeros while sampling, and the map of them has no bias.
        elif name.removeprefix("model.") != "map_augment.weight":
            weights[name.removeprefix("model.")] = value
    return weights


def _blocks(weights: Mapping[str, Tensor], side: str) -> dict[str, tuple[int, str, int]]:
    """(resolution, kind, number) of each block of ``enc`` or ``dec`` by prefix, in the order in which they run."""
    found = {
        match[0][:-1]: (int(match[2]), match[3], int(match[4] or 0))
        for match in filter(None, map(_BLOCK.match, weights))
        if match[1] == side
    }
    sign = -1 if side == "enc" else 1
    # Within a resolution, what changes it comes first.
    return dict(sorted(found.items(), key=lambda item: (sign * item[1][0], item[1][1] == "block", item[1][2])))


def _places(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Where each block goes: EDM's prefix to ADM's of its residual part and of its attention."""
    places = {name: (f"input_blocks.{n}.0", f"input_blocks.{n}.1") for n, name in enumerate(_blocks(weights, "enc"))}
    number, previous = -1, ""
    for name, (_, kind, index) in _blocks(weights, "dec").items():
        if kind == "in":
            places[name] = f"middle_block.{2 * index}", f"middle_block.{2 * index + 1}"
        elif kind == "up":  # part of ADM's last block of the level below
            places[name] = f"output_blocks.{number}.{2 if f'{previous}.qkv.weight' in weights else 1}", ""
        else:
            number += 1
            places[name] = f"output_blocks.{number}.0", f"output_blocks.{number}.1"
        previous = name
    return places


def from_edm(state: Mapping[str, Tensor], head_channels: int = HEAD_CHANNELS) -> dict[str, Tensor]:
    """Weights of EDM's DhariwalUNet by the names, and in the orders, of :class:`~calib_guidance.networks.UNet`.

    Tensors that are not reordered share their memory with those of ``state``. Each attention head has ``head_channels``.
    """
    weights = _bare(state)
    places, renamed = _places(weights), {}
    for name, value in weights.items():
        prefix, _, kind = name.rpartition(".")
        block, _, layer = prefix.rpartition(".")
        if name == "map_label.weight":
            renamed["label_emb.weight"] = value.t()
        elif prefix in _RENAMED:
            renamed[f"{_RENAMED[prefix]}.{kind}"] = value
        elif prefix in places:  # the first convolution
            renamed[f"{places[prefix][0]}.{kind}"] = value
        elif block in places and layer in _LAYERS:
            part, inside = _LAYERS[layer]
            if layer == "qkv":
                heads, rest = divmod(len(value), 3 * head_channels)
                if rest or not heads:
                    raise ValueError(f"{name}: {len(value) // 3} channels cannot be split in heads of {head_channels}")
                # [head][channel][q,k,v] to [head][q,k,v][channel].
                value = value.unflatten(0, (heads, head_channels, 3)).transpose(1, 2).flatten(0, 2)
            value = value.squeeze(-1) if part == 1 and value.ndim == 4 else value
            renamed[f"{places[block][part]}.{inside}.{kind}"] = value
        else:
            raise ValueError(f"{name!r} is not a weight of EDM's DhariwalUNet, whose blocks have {', '.join(_LAYERS)}")
    return renamed


def edm_architecture(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Arguments of the :class:`~calib_guidance.networks.UNet` that EDM's weights belong to, all but dropout and dtype."""
    weights = _bare(state)
    blocks = _blocks(weights, "enc").values()
    resolutions = list(dict.fromkeys(resolution for resolution, _, _ in blocks))
    if not is_edm(state) or not resolutions:
        raise ValueError("these are not the weights of EDM's DhariwalUNet, whose names begin with map_layer0 and enc.")
    size, width = resolutions[0], weights["map_layer0.weight"].shape[1]
    first = {r: f"enc.{r}x{r}_block0" for r in resolutions}
    return {
        "image_size": size,
        "in_channels": weights[f"enc.{size}x{size}_conv.weight"].shape[1],
        "model_channels": width,
        "out_channels": len(weights["out_conv.weight"]),
        "num_res_blocks": sum(r == size and kind == "block" for r, kind, _ in blocks),
        "attention_resolutions": tuple(size // r for r in resolutions if f"{first[r]}.qkv.weight" in weights),
        "channel_mult": tuple(len(weights[f"{first[r]}.conv0.weight"]) // width for r in resolutions),
        "num_classes": weights["map_label.weight"].shape[1] if "map_label.weight" in weights else None,
        "num_head_channels": HEAD_CHANNELS,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "channel_mult_emb": len(weights["map_layer0.weight"]) // width,
        "min_group_channels": MIN_GROUP_CHANNELS,
        "middle_attention": f"dec.{resolutions[-1]}x{resolutions[-1]}_in0.qkv.weight" in weights,
    }
