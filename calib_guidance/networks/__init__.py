"""Networks: what maps arrays to arrays and knows nothing of diffusion."""

from calib_guidance.networks.adm import EncoderUNet as EncoderUNet
from calib_guidance.networks.adm import UNet as UNet
from calib_guidance.networks.ddt import DiTDH as DiTDH
from calib_guidance.networks.dit import DiT as DiT
from calib_guidance.networks.edm2 import EDM2UNet as EDM2UNet
from calib_guidance.networks.lightningdit import LightningDiT as LightningDiT
from calib_guidance.networks.patch_unet import PatchUNet as PatchUNet
from calib_guidance.networks.small_resnet import SmallResNet as SmallResNet
