"""The shipped diffusion model of the digits, as tests use it."""

from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.networks import UNet


def digits_unet(dtype="float32"):
    """Without weights."""
    return UNet(
        8,
        1,
        32,
        2,
        1,
        (2,),
        channel_mult=(1, 2),
        num_classes=10,
        num_head_channels=32,
        use_scale_shift_norm=True,
        resblock_updown=True,
        dtype=dtype,
    )


def digits_denoiser(class_conditional=True, dtype="float32"):
    """With the repository root as working directory."""
    return ADMDenoiser(
        digits_unet(dtype),
        "checkpoints/digits/diffusion.safetensors",
        "cosine",
        prediction="v",
        class_conditional=class_conditional,
    )
