"""Networks: what maps arrays to arrays and knows nothing of diffusion."""

from calib_guidance.networks.adm import EncoderUNet, UNet
from calib_guidance.networks.dit import DiT
from calib_guidance.networks.small_resnet import SmallResNet

__all__ = ["DiT", "EncoderUNet", "SmallResNet", "UNet"]
