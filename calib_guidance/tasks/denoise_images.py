"""Denoised images as a Lightning predict loop: a data set to train classifiers on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_guidance.data.requests import DenoiseRequests
from calib_guidance.denoisers.base import Denoiser
from calib_guidance.errors import ConfigurationError
from calib_guidance.tasks.retry import Attempt, FaultTolerant, Samples, in_float32
from calib_guidance.training.inputs import DenoisedInput, Precision


class DenoiseImages(FaultTolerant):
    """x̂0(x_t) of the images of :class:`~calib_guidance.data.DenoiseRequests`, with t, for SampleWriter to write.

    What ``fit`` computes at every step with :class:`~calib_guidance.training.DenoisedInput` is computed once here. Written as
    8-bit images, it is off by half a gray level at most (1/255 on the scale of [-1, 1]), and by nothing on average where the
    writer's ``uint8_rule`` is ``round_up_half``.

    Args:
        denoiser: the diffusion model to be guided; a class-conditional one is given the labels.
        steps, weights, precision: see :class:`~calib_guidance.training.DenoisedInput`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: str | int | None = None,
        weights: Sequence[float] | None = None,
        precision: Precision = "bf16",
    ):
        super().__init__()
        self.input_transform = DenoisedInput(denoiser, steps, weights, precision)

    def check(self) -> None:
        """Raise ConfigurationError where data and denoiser cannot go together. Nothing is denoised or written here."""
        requests = self.trainer.datamodule
        if not isinstance(requests, DenoiseRequests):
            raise ConfigurationError(
                "DenoiseImages needs images: set data.class_path to calib_guidance.data.DenoiseRequests, got "
                f"{type(requests).__name__}"
            )
        self.input_transform.check_image(requests.image_shape)
        self.give_num_classes(requests, self.input_transform.frozen.module.num_classes)
        self.input_transform.check_classes(requests.num_classes)

    def networks(self) -> dict[str, nn.Module]:
        """What images are made with, by name."""
        return {"denoiser": self.input_transform.frozen.module}

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.check()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Samples:
        if not len(batch["index"]):  # no image of it can be read
            return Samples({"image": batch["image"], "t": batch["index"]}, [])
        return super().predict_step(batch, batch_idx)

    def attempt(self, batch: dict[str, Tensor], float32: bool) -> Attempt:
        """``image`` ``(N, C, H, W)`` in [-1, 1] and ``t`` ``(N,)`` for requests ``{index, source, label, seed, image}``."""
        seed = int(batch["seed"][0])
        if float32:
            with in_float32(self.input_transform.frozen.module):
                images, t = self.input_transform(batch | {"image": batch["image"].float()}, seed, precision="fp32")
        else:
            images, t = self.input_transform(batch, seed)
        return Attempt(
            {"image": images, "t": t}, t.double().masked_fill(images.sum(dim=(1, 2, 3)).isfinite(), torch.nan)
        )
