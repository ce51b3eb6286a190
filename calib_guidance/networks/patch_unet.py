"""The UNet of ADM on blocks of pixels."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from calib_guidance.networks.adm import UNet


class PatchUNet(UNet):
    """A :class:`UNet` whose pixels are blocks of ``patch_size`` × ``patch_size`` pixels of the image.

    The image ``(N, C, H, W)`` is rearranged to ``(N, C·p², H/p, W/p)`` and the output back. It trains faster on
    CPUs: convolutions of few channels at full resolution use little of their arithmetic.

    Args:
        image_size: height (= width) of the images, in pixels.
        in_channels, out_channels: of images, as of a :class:`UNet`.
        patch_size: p, side of a block; ``image_size`` is a multiple of it.
        num_classes: number of classes, or None for a network without labels.

    Examples:
        >>> import torch
        >>> network = PatchUNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,), patch_size=2)
        >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 3,
        *args: Any,
        patch_size: int = 2,
        num_classes: int | None = None,
        **kwargs: Any,
    ):
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
        block = patch_size**2
        super().__init__(
            image_size // patch_size,
            in_channels * block,
            model_channels,
            out_channels * block,
            *args,
            num_classes=num_classes,
            **kwargs,
        )
        # What denoisers and checks read is about images.
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.patch_size = patch_size
        self.size_multiple *= patch_size

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """The network on ``x`` ``(N, C, H, W)`` with a ready embedding ``(N, emb_channels)``."""
        return F.pixel_shuffle(super().decode(F.pixel_unshuffle(x, self.patch_size), emb), self.patch_size)
