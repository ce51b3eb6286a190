"""Models of the diffusers library."""

from typing import Any

from torch import Tensor, nn

from calib_guidance.denoisers.module import ModuleDenoiser
from calib_guidance.errors import check_choice
from calib_guidance.weights.diffusers_folder import load_model, scheduler_config

_PREDICTIONS: dict[str, Any] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


class _Sample(nn.Module):
    """A diffusers model as ``network(x_t, t, y)``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        labels = {} if y is None else {"class_labels": y}
        return self.model(x_t, t, return_dict=False, **labels)[0]


class DiffusersDenoiser(ModuleDenoiser):
    """A ``UNet2DModel`` of diffusers with the noise schedule of its scheduler.

    ::

        denoiser = DiffusersDenoiser("hf://google/ddpm-cifar10-32")

    Its scheduler says β, T and what is predicted. For models in latent space there is DiTDenoiser.

    Args:
        model: a ``UNet2DModel``; or its folder, or that of its pipeline (``unet/``, ``scheduler/``), or ``hf://OWNER/NAME``.
        scheduler: a diffusers scheduler or its configuration; None takes that of the pipeline's folder.
        null_label: label that the model was trained with for "no class"; None where there is none.
        options: ``compile`` and ``dtype`` of :class:`ModuleDenoiser`.
    """

    def __init__(
        self,
        model: nn.Module | str,
        scheduler: Any | dict[str, Any] | None = None,
        null_label: int | None = None,
        **options: Any,
    ):
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # seconds to import

        if scheduler is None:
            if not isinstance(model, str):
                raise ValueError("a model without a pipeline's folder needs scheduler, such as DDPMScheduler(...)")
            scheduler = scheduler_config(model)
        config = dict(getattr(scheduler, "config", scheduler))
        unet: Any = load_model(model, "UNet2DModel", "unet") if isinstance(model, str) else model
        size = unet.config.sample_size
        if size is None:
            raise ValueError("the model's configuration has no sample_size: set it to the side of its images in pixels")
        height, width = (size, size) if isinstance(size, int) else size
        channels = unet.config.in_channels
        schedule: Any = DDPMScheduler.from_config(config)
        predicted = config.get("prediction_type", "epsilon")
        check_choice("prediction_type", predicted, _PREDICTIONS)
        super().__init__(
            _Sample(unet),
            (channels, height, width),
            noise_schedule=schedule.betas.double().tolist(),
            prediction=_PREDICTIONS[predicted],
            num_classes=unet.config.num_class_embeds,
            null_label=null_label,
            learned_variance=unet.config.out_channels == 2 * channels,
            **options,
        )
