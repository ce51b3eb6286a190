"""Between images in [-1, 1] and 8-bit images. The only place that converts."""

from typing import Literal, get_args

import torch
from torch import Tensor

from calib_guidance.errors import check_choice

Uint8Rule = Literal["truncate", "round_up_half"]
UINT8_RULES = get_args(Uint8Rule)


def to_uint8(x: Tensor, rule: Uint8Rule = "truncate") -> Tensor:
    """8-bit images of images in [-1, 1]; what lies outside is clipped.

    The published codes disagree by up to one gray level, which moves FID, so the rule is stored with the samples.

    Args:
        x: any shape, float.
        rule: ``truncate``, (x + 1)·127.5 cut off (guided-diffusion); ``round_up_half``, x·127.5 + 128 cut off (EDM, DiT).
    """
    check_choice("uint8_rule", rule, UINT8_RULES)
    scaled = (x.float() + 1) * 127.5 if rule == "truncate" else x.float() * 127.5 + 128
    return scaled.clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Float images in [-1, 1] of 8-bit images."""
    return x.float() / 127.5 - 1
