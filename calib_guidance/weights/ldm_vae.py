"""Decoders of autoencoders by the names of latent diffusion's code (CompVis), as VA-VAE and REPA-E publish them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from calib_guidance.errors import CheckpointError, check_installed
from calib_guidance.weights.io import Weights, load_weights, read_weights

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _renamed(name: str, levels: int) -> str:
    """A name of the decoder as diffusers has it; levels count from the coarsest there."""
    if match := re.fullmatch(r"up\.(\d+)\.(block|attn|upsample)\.(\d+|conv)\.?(.*)", name):
        level, kind, number, rest = levels - 1 - int(match[1]), match[2], match[3], match[4]
        place = {"block": f"resnets.{number}", "attn": f"attentions.{number}", "upsample": "upsamplers.0.conv"}[kind]
        name = f"up_blocks.{level}.{place}.{rest}"
    elif match := re.fullmatch(r"mid\.(block|attn)_(\d)\.(.*)", name):
        name = f"mid_block.{'resnets' if match[1] == 'block' else 'attentions'}.{int(match[2]) - 1}.{match[3]}"
    if ".attentions." in name:
        head, layer, kind = name.rsplit(".", 2)
        name = f"{head}.{_ATTENTION.get(layer, layer)}.{kind}"
    return name.replace("nin_shortcut", "conv_shortcut").replace("norm_out.", "conv_norm_out.")


def ldm_decoder(state: Mapping[str, Tensor], path: str = "weights") -> nn.Module:
    """A module with ``post_quant_conv`` and ``decoder``, of the weights of an autoencoder; all other entries are dropped."""
    check_installed("diffusers", "diffusers", "the decoder of an autoencoder")
    from diffusers.models.autoencoders.vae import Decoder  # seconds to import

    inner = {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}
    levels = sorted({int(match[1]) for match in (re.match(r"up\.(\d+)\.", name) for name in inner) if match})
    if not levels or "post_quant_conv.weight" not in state or "conv_in.weight" not in inner:
        raise CheckpointError(f"{path}: expected an autoencoder with decoder.up.0 … and post_quant_conv")
    widths = [len(inner[f"up.{level}.block.0.conv2.weight"]) for level in levels]
    blocks = {int(match[1]) for match in (re.match(r"up\.0\.block\.(\d+)\.", name) for name in inner) if match}
    kinds = ["AttnUpDecoderBlock2D" if f"up.{n}.attn.0.q.weight" in inner else "UpDecoderBlock2D" for n in levels]
    vae = nn.Module()
    vae.decoder = Decoder(
        in_channels=inner["conv_in.weight"].shape[1],
        up_block_types=kinds[::-1],
        block_out_channels=widths,
        layers_per_block=len(blocks) - 1,
    )
    vae.post_quant_conv = nn.Conv2d(*state["post_quant_conv.weight"].shape[1::-1], 1)
    renamed = {f"post_quant_conv.{kind}": state[f"post_quant_conv.{kind}"] for kind in ("weight", "bias")}
    for name, value in inner.items():
        name = _renamed(name, len(levels))
        # Attention's 1×1 convolutions are linear layers there.
        renamed[f"decoder.{name}"] = value[..., 0, 0] if ".attentions." in name and value.ndim == 4 else value
    load_weights(vae, Weights(path, renamed))
    return vae.eval()


def read_ldm_decoder(path: str) -> nn.Module:
    """:func:`ldm_decoder` of a file, or of the ``vae`` in a checkpoint of REPA-E."""
    return ldm_decoder(read_weights(path, "vae").state, str(path))


def latent_statistics(path: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents by channel, ``(C,)``.

    From ``mean`` and ``std`` (LightningDiT), ``latents_bias`` and ``latents_scale`` (REPA-E), or a checkpoint with the running
    statistics ``bn`` (REPA-E).
    """
    state = read_weights(path).state
    if {"mean", "std"} <= state.keys():
        mean, std = state["mean"], state["std"]
    elif {"latents_bias", "latents_scale"} <= state.keys():
        mean, std = state["latents_bias"], 1 / state["latents_scale"]
    elif {"bn.running_mean", "bn.running_var"} <= state.keys():
        mean, std = state["bn.running_mean"], state["bn.running_var"].sqrt()
    else:
        raise CheckpointError(
            f"{path}: expected statistics of latents: mean and std, latents_bias and latents_scale, or bn.running_mean and "
            "bn.running_var"
        )
    return mean.flatten().float(), std.flatten().float()
