"""The published weights that this project knows: where they are, under which licence, and how each network was made.

Much of how a network was made does not show in its weights: heads and channel order of the attention, groups of the
normalisation, noise schedule, what is predicted. Weights load just as well into a network that differs in these, which then
computes something else. So they stand here once, by name, and :func:`check` holds them against what a configuration says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from calib_guidance.errors import CheckpointError
from calib_guidance.networks.adm import AttentionBlock, EncoderUNet, GroupNorm, UNet

_NETWORKS = {"adm": UNet, "adm_classifier": EncoderUNet, "edm": UNet}
_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
_TORCHVISION = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        name: by which configurations name it.
        kind: ``adm``, ``adm_classifier``, ``edm``, ``dit``, ``vae``, ``classifier``, ``clip`` or ``features``.
        file: its file name, or the name of its folder.
        source: address, or ``hf://owner/repo``.
        bytes: its size; about four times the parameters where the publisher states none.
        licence: of the weights.
        used_by: what takes it here.
        parameters: number of parameters; None where it is not known.
        architecture: arguments of the network.
        settings: what the network was trained for, in the words of the denoisers' options.
        landmarks: shapes of a few tensors, of files whose names are not those of a network built here.
    """

    name: str
    kind: str
    file: str
    source: str
    bytes: int
    licence: str
    used_by: str
    parameters: int | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    landmarks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_BLOCKS = {"attention_resolutions": (32, 16, 8), "use_scale_shift_norm": True, "resblock_updown": True}


def _adm(image_size: int, attention_resolutions: Iterable[int], **arguments: Any) -> dict[str, Any]:
    """Arguments of an ADM network; its publishers give the attention in pixels, the network takes downsampling factors."""
    factors = tuple(image_size // resolution for resolution in attention_resolutions)
    return {"image_size": image_size, "in_channels": 3, "attention_resolutions": factors, **arguments}


def _diffusion(
    size: int, name: str, file: str, parameters: int, schedule: str = "linear", **architecture: Any
) -> Published:
    common = {"out_channels": 6, "num_classes": 1000, "dtype": "float16"} | _BLOCKS
    return Published(
        name,
        "adm",
        file,
        _OPENAI + file,
        4 * parameters,
        "MIT",
        "ADMDenoiser",
        parameters,
        _adm(size, **common | architecture),
        {"noise_schedule": schedule, "prediction": "epsilon", "num_steps": 1000},
    )


def _classifier(
    size: int, parameters: int, depth: int, channel_mult: tuple[float, ...], schedule: str = "linear"
) -> Published:
    file = f"{size}x{size}_classifier.pt"
    architecture = {
        "model_channels": 128,
        "out_channels": 1000,
        "num_res_blocks": depth,
        "channel_mult": channel_mult,
        "num_head_channels": 64,
        "use_new_attention_order": False,
        "dtype": "float32",  # as its publishers sample with it, beside a diffusion model in float16
    }
    return Published(
        f"adm_classifier{size}",
        "adm_classifier",
        file,
        _OPENAI + file,
        4 * parameters,
        "MIT",
        "NoiseAwareClassifier",
        parameters,
        _adm(size, **_BLOCKS | architecture),
        {"noise_schedule": schedule, "num_steps": 1000},  # of the diffusion model of this size
    )


def _resnet(depth: int, version: int, digest: str, size: int, parameters: int) -> Published:
    file = f"resnet{depth}-{digest}.pth"
    blocks = {50: 6, 101: 23}[depth]
    return Published(
        f"resnet{depth}_v{version}",
        "classifier",
        file,
        _TORCHVISION + file,
        size,
        "BSD-3-Clause; trained on ImageNet, whose terms are for research",
        f"OffTheShelfClassifier (torchvision/resnet{depth}, weights IMAGENET1K_V{version})",
        parameters,
        landmarks={f"layer3.{blocks - 1}.conv3.weight": (1024, 256, 1, 1), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
    )


def _dit(size: int) -> Published:
    file = f"DiT-XL-2-{size}x{size}.pt"
    tokens = (size // 16) ** 2
    parameters = 674_834_720 + 1152 * tokens  # the positions are counted, as their publishers do
    return Published(
        f"dit_xl_2_{size}",
        "dit",
        file,
        f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
        4 * parameters,
        "CC BY-NC 4.0",
        "DiTDenoiser",
        parameters,
        {
            "input_size": size // 8,
            "patch_size": 2,
            "hidden_size": 1152,
            "depth": 28,
            "num_heads": 16,
            "num_classes": 1000,
        },
        {"noise_schedule": "linear", "prediction": "epsilon", "num_steps": 1000},
        {"pos_embed": (1, tokens, 1152), "blocks.27.attn.qkv.weight": (3456, 1152)},
    )


def _vae(variant: str) -> Published:
    return Published(
        f"sd_vae_ft_{variant}",
        "vae",
        f"sd-vae-ft-{variant}",
        f"hf://stabilityai/sd-vae-ft-{variant}",
        334_643_276,
        "MIT",
        "DiTDenoiser (vae)",
        83_653_863,
        landmarks={
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
            "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3),
        },
    )


_WIDE = {"model_channels": 256, "num_res_blocks": 2, "use_new_attention_order": False}
_DEEP = {
    "model_channels": 192,
    "num_res_blocks": 3,
    "channel_mult": (1, 2, 3, 4),
    "num_head_channels": 64,
    "dropout": 0.1,
}
_ENTRIES = (
    _diffusion(
        64, "adm_imagenet64", "64x64_diffusion.pt", 295_904_454, "cosine", **_DEEP, use_new_attention_order=True
    ),
    _diffusion(
        128, "adm_imagenet128", "128x128_diffusion.pt", 421_529_606, **_WIDE, channel_mult=(1, 1, 2, 3, 4), num_heads=4
    ),
    _diffusion(
        256,
        "adm_imagenet256",
        "256x256_diffusion.pt",
        553_838_086,
        **_WIDE,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_head_channels=64,
    ),
    _diffusion(
        256,
        "adm_imagenet256_uncond",
        "256x256_diffusion_uncond.pt",
        552_814_086,
        **_WIDE,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_head_channels=64,
        num_classes=None,
    ),
    _diffusion(
        512,
        "adm_imagenet512",
        "512x512_diffusion.pt",
        558_997_638,
        **_WIDE,
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
        num_head_channels=64,
        dtype="float32",
    ),
    _classifier(64, 65_438_568, 4, (1, 2, 3, 4), "cosine"),
    _classifier(128, 42_568_040, 2, (1, 1, 2, 3, 4)),
    _classifier(256, 54_096_360, 2, (1, 1, 2, 2, 4, 4)),
    _classifier(512, 54_448_360, 2, (0.5, 1, 1, 2, 2, 4, 4)),
    Published(
        "edm_imagenet64",
        "edm",
        "edm-imagenet-64x64-cond-adm.pkl",
        "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl",
        1_183_600_000,
        "CC BY-NC-SA 4.0",
        "EDMDenoiser",
        295_899_267,
        _adm(
            64,
            **_BLOCKS | _DEEP,
            out_channels=3,
            num_classes=1000,
            use_new_attention_order=False,  # after the key map, which sorts EDM's own order
            min_group_channels=4,
            dtype="float16",
        ),
        {"sigma_data": 0.5},
        {
            "model.enc.64x64_conv.weight": (192, 3, 3, 3),
            "model.map_label.weight": (768, 1000),
            "model.enc.8x8_block2.qkv.weight": (2304, 768, 1, 1),
        },
    ),
    _dit(256),
    _dit(512),
    _vae("ema"),
    _vae("mse"),
    Published(
        "taesd",
        "vae",
        "taesd",
        "hf://madebyollin/taesd",
        9_793_292,
        "MIT",
        "TinyDecoder",
        2_445_063,
        landmarks={"decoder.layers.0.weight": (64, 4, 3, 3), "encoder.layers.0.weight": (64, 3, 3, 3)},
    ),
    _resnet(50, 1, "0676ba61", 102_530_333, 25_557_032),
    _resnet(50, 2, "11ad3fa6", 102_540_417, 25_557_032),
    _resnet(101, 1, "63fe2227", 178_793_939, 44_549_160),
    _resnet(101, 2, "cd907fc2", 178_814_045, 44_549_160),
    Published(
        "clip_vit_l_14_336",
        "clip",
        "vit_large_patch14_clip_336.openai",
        "hf://timm/vit_large_patch14_clip_336.openai",
        1_711_700_000,
        "MIT",
        "CLIPClassifier (open_clip ViT-L-14-336-quickgelu: OpenAI trained with QuickGELU)",
        427_944_193,
    ),
    Published(
        "inception_2015",
        "features",
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        95_628_359,
        "Apache-2.0",
        "InceptionFeatures",
    ),
)
TABLE: Mapping[str, Published] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def entry(name: str, kind: str | None = None) -> Published:
    """The entry of a name.

    Raises:
        ValueError: another name, or one of another kind; names those that there are.
    """
    known = [other.name for other in TABLE.values() if kind in (None, other.kind)]
    if name not in known:
        raise ValueError(f"unknown published network {name!r}; known: {', '.join(known)}, or a class_path of your own")
    return TABLE[name]


def by_file(path: str | os.PathLike[str]) -> Published | None:
    """The entry whose file or folder ``path`` names, whatever the folder it lies in; None for others."""
    parts = Path(path).parts
    return next((found for found in TABLE.values() if found.file in parts), None)


def unet(name: str, dtype: str | None = None) -> UNet | EncoderUNet:
    """The UNet or noise-aware classifier of a name, its weights not yet loaded.

    Args:
        name: of an entry of kind ``adm``, ``adm_classifier`` or ``edm``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of the convolutions; None takes what it was published with
            (float16, which few CPUs compute fast: float32 or bfloat16 there).

    Raises:
        ValueError: an unknown name or ``dtype``.
    """
    found = entry(name)
    if found.kind not in _NETWORKS:
        raise ValueError(f"{name} is no UNet but a {found.kind}")
    return _NETWORKS[found.kind](**found.architecture | ({} if dtype is None else {"dtype": dtype}))


@cache
def reference(name: str) -> UNet | EncoderUNet:
    """The network of :func:`unet` without memory for weights, to compare with. Not to be changed."""
    with torch.device("meta"):
        return unet(name, "float32")


def recognise(state: Mapping[str, Tensor], kind: str | None = None) -> list[str]:
    """Names of the published files that have these weights' names and shapes: none, one, or several of the same shapes."""
    count = sum(value.numel() for value in state.values())
    shapes = {name: value.shape for name, value in state.items()}

    def fits(known: Published) -> bool:
        if known.landmarks and known.landmarks.items() <= shapes.items():
            return known.parameters <= count < 1.01 * known.parameters  # buffers are counted too
        if known.kind not in _NETWORKS or known.parameters != count:  # the count spares building each network
            return False
        return shapes == {name: value.shape for name, value in reference(known.name).state_dict().items()}

    return [name for name, known in TABLE.items() if kind in (None, known.kind) and fits(known)]


def build(
    network: nn.Module | str | None, kind: str, dtype: str | None = None, state: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Published | None]:
    """The network of a configuration, and the published one that it is, where it is one.

    Args:
        network: a module, taken as it is; a published name; or None, for the one that has the shapes of ``state``.
        kind: of the published networks that fit here.
        dtype: see :func:`unet`; only for published ones.
        state: weights that will be loaded. A published network gets no others, which saves making them.

    Raises:
        ValueError: an unknown name, nothing to know the network by, or a ``dtype`` that goes elsewhere.
        CheckpointError: shapes of no published network, or of several.
    """
    names = [] if state is None else recognise(state, kind)
    if isinstance(network, nn.Module):
        if dtype is not None:
            raise ValueError(
                "dtype is for published networks; a network of your own has its own (network.init_args.dtype)"
            )
        return network, TABLE[names[0]] if len(names) == 1 else None
    if network is None:
        known = ", ".join(other.name for other in TABLE.values() if other.kind == kind)
        if state is None:
            raise ValueError(
                f"network: give a published name ({known}), a class_path of your own, or the checkpoint of a published one"
            )
        if len(names) != 1:
            raise CheckpointError(
                f"the checkpoint has the names and shapes of {' and '.join(names) or 'none'} of the published networks "
                f"({known}), and shapes do not tell the rest: state network, with num_heads or num_head_channels and "
                "use_new_attention_order, and of a diffusion model noise_schedule and prediction"
            )
        (network,) = names
    known = entry(network, kind)
    if state is None:
        return unet(network, dtype), known
    with torch.device("meta"):
        empty = unet(network, dtype)
    return empty.to_empty(device="cpu"), known


def unseen(network: nn.Module) -> dict[str, str]:
    """What the weights of an ADM network do not show of it, as text; nothing for other networks."""
    if not isinstance(network, (UNet, EncoderUNet)):
        return {}

    def runs(values: Iterable[object]) -> str:
        return ", ".join(f"{len(list(run))}×{value}" for value, run in groupby(values))

    attention = [module for module in network.modules() if isinstance(module, AttentionBlock)]
    return {
        "attention_order": runs("new" if block.use_new_attention_order else "legacy" for block in attention),
        "attention_heads": runs(block.num_heads for block in attention),
        "norm_groups": runs(module.num_groups for module in network.modules() if isinstance(module, GroupNorm)),
    }


_OPTIONS = {
    "attention_order": ("use_new_attention_order",),
    "attention_heads": ("num_heads", "num_head_channels"),
    "norm_groups": ("min_group_channels",),
}


def check(name: str, settings: Mapping[str, object], path: str | os.PathLike[str] | None = None) -> None:
    """Compare how weights are used with how the published ones that have their names and shapes were made.

    Args:
        name: published name.
        settings: options of the configuration, e.g. ``noise_schedule``, and what :func:`unseen` says of the network.
        path: file of the weights, for the message; None where the configuration names the network itself.

    Raises:
        CheckpointError: naming each difference and what to set.
    """
    known = TABLE[name]
    made = known.architecture | known.settings | (unseen(reference(name)) if known.kind in _NETWORKS else {})
    different = [option for option, value in settings.items() if option in made and made[option] != value]
    if different:
        found = "; ".join(f"{option.replace('_', ' ')} {made[option]}, here {settings[option]}" for option in different)
        options = [word for option in different for word in _OPTIONS.get(option, (option,))]
        stated = known.architecture | known.settings
        cure = ", ".join(f"{option}: {stated[option]}" for option in options if option in stated)
        if path is None:
            raise CheckpointError(f"network: {name} was made with {found}: set {cure}, or leave it to the name")
        raise CheckpointError(
            f"{path} has the names and shapes of {name}, which was made with {found}. The weights would load and compute "
            f"something else: set {cure}, or name the network, network: {name}"
        )


def markdown() -> str:
    """The table of checkpoints/README.md."""
    lines = ["| name | file | source | size | licence | used by |", "|---|---|---|---:|---|---|"]
    for known in TABLE.values():
        source = known.source
        if source.startswith("hf://"):
            source = f"[{source}](https://huggingface.co/{source.removeprefix('hf://')})"
        size = f"{known.bytes / 1e9:.2f} GB" if known.bytes >= 1e9 else f"{known.bytes / 1e6:.0f} MB"
        address = source if source.startswith("[") else f"<{source}>"
        lines.append(f"| `{known.name}` | `{known.file}` | {address} | {size} | {known.licence} | {known.used_by} |")
    return "\n".join(lines)
