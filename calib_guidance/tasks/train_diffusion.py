"""Training a diffusion model."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from calib_guidance.diffusion.parameterization import Parameterization, diffuse, network_target, x0_coefficients
from calib_guidance.diffusion.schedules import NoiseSchedule, ScheduleName, named_betas
from calib_guidance.errors import check_choice
from calib_guidance.tasks.base import TrainingTask
from calib_guidance.training.losses import variational_bound_term
from calib_guidance.training.objective import Objective
from calib_guidance.weights import registry
from calib_guidance.weights.io import WeightsFile, load_weights

Variance = Literal["fixed", "learned_range"]


class TrainDiffusion(TrainingTask):
    """Fits a diffusion model: mean squared error on ε or v, plus the variational bound where the variance is learned.

    The hybrid loss is that of Improved DDPM (Nichol & Dhariwal 2021, Eq. 16), with the bound's gradient kept from the mean. An
    average of the weights comes from Lightning's ``EMAWeightAveraging`` callback.

    Args:
        network: maps (x_t, t, y) to the prediction, and to the variance's interpolation in further channels where learned.
        noise_schedule: ``linear`` or ``cosine``.
        num_steps: length of the diffusion process.
        prediction: ``epsilon`` or ``v``.
        variance: ``fixed`` or ``learned_range``.
        label_dropout: fraction of samples trained without their label, so that one network serves as conditional and
            unconditional model (Ho & Salimans 2022).
        objective: ``FlowMatching`` or ``EDMLoss`` (:mod:`calib_guidance.training`) in place of ε and v; ``noise_schedule``,
            ``num_steps``, ``prediction`` and ``variance`` are then not used. ``FlowDenoiser`` or ``EDM2Denoiser`` samples
            what was trained.
        checkpoint: weights of the network to start from; None for those of its method ``initialize``, where it has one. An
            interrupted run is resumed with ``--ckpt_path`` instead, which has the state of the optimizer too.
        compile: compile the network with torch.compile; its parameters keep their names.
        optimizer: builds the optimizer.
        lr_scheduler: builds the rate schedule, stepped at every optimizer step; none by default.
    """

    def __init__(
        self,
        network: nn.Module,
        noise_schedule: ScheduleName = "linear",
        num_steps: int = 1000,
        prediction: Parameterization = "epsilon",
        variance: Variance = "learned_range",
        label_dropout: float = 0.1,
        objective: Objective | None = None,
        checkpoint: WeightsFile | str | None = None,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__(optimizer, lr_scheduler)
        check_choice("variance", variance, get_args(Variance))
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        self.network = network
        self.prediction, self.variance, self.label_dropout = prediction, variance, label_dropout
        self.weights_metadata = {"prediction": prediction, "noise_schedule": noise_schedule, "num_steps": num_steps}
        self.objective = objective
        if objective is not None:
            objective.check(network)
            self.weights_metadata = dict(objective.metadata)
        self.weights_metadata |= registry.nonstate_hparams(network)
        if checkpoint is not None:
            load_weights(network, checkpoint, **self.weights_metadata)
        elif hasattr(network, "initialize"):
            network.initialize()
        tables = NoiseSchedule(named_betas(noise_schedule, num_steps))
        names = ("betas", "log_variance_clipped", "mean_coef1", "mean_coef2")
        buffers = {name: getattr(tables.posterior, name) for name in names} | {"alphas_cumprod": tables.alphas_cumprod}
        buffers["x0_from_x"], buffers["x0_from_output"] = x0_coefficients(prediction, tables.alphas_cumprod)
        for name, table in buffers.items():
            self.register_buffer(name, torch.tensor(table).float(), persistent=False)
        if compile:
            network.compile()

    def loss(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss per sample ``(N,)`` of images ``(N, C, H, W)`` with labels and steps ``(N,)``, or τ or σ, and their noise."""
        labels = y if self.network.num_classes is not None else None
        if self.objective is not None:
            return self.objective(self.network, x0, labels, t, noise)

        def at(table: Tensor) -> Tensor:
            return table[t].view(-1, 1, 1, 1)

        abar = at(self.alphas_cumprod)
        x_t = diffuse(x0, noise, abar)
        output = self.network(x_t, t, labels)
        target = network_target(self.prediction, x0, noise, abar)
        if self.variance == "fixed":
            return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        output, interpolation = output.chunk(2, dim=1)
        mse = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        x0_hat = at(self.x0_from_x) * x_t + at(self.x0_from_output) * output.detach()
        coef1, coef2 = at(self.mean_coef1), at(self.mean_coef2)
        low, high = at(self.log_variance_clipped), at(self.betas).log()
        bound = variational_bound_term(
            x0,
            true_mean=coef1 * x0 + coef2 * x_t,
            true_log_variance=low,
            mean=coef1 * x0_hat + coef2 * x_t,
            log_variance=low + (interpolation + 1) / 2 * (high - low),
            is_first_step=t == 0,
        )
        return mse + bound * len(self.betas) / 1000

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x0, y = batch["image"], batch["label"]
        dropped = torch.rand(len(y), device=y.device) < self.label_dropout
        if self.objective is None:
            t = torch.randint(len(self.betas), (len(y),), device=y.device)
        else:
            t = self.objective.quantile(torch.rand(len(y), device=y.device))
        return self.log_loss(self.loss(x0, y.masked_fill(dropped, -1), t, torch.randn_like(x0)).mean())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        x0, y = batch["image"], batch["label"]
        # The same steps and noise every time, distributed over the process, so that values can be compared between epochs.
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        if self.objective is None:
            t = torch.linspace(0, len(self.betas) - 1, len(x0), device=x0.device).long()
        else:
            t = self.objective.quantile((torch.arange(len(x0), device=x0.device) + 0.5) / len(x0))
        t = t[torch.randperm(len(x0), generator=generator).to(t.device)]
        losses = self.loss(x0, y, t, noise), self.loss(x0, torch.full_like(y, -1), t, noise)
        self._heldout += torch.stack([torch.ones_like(losses[0]), *losses], 1).double().sum(0).cpu()

    def on_validation_epoch_start(self) -> None:
        self._heldout = torch.zeros(3, dtype=torch.float64)  # number of images, and the sums of their losses

    def on_validation_epoch_end(self) -> None:
        # Lightning's own means over devices are wrong where these have different numbers of images.
        sums = self.trainer.strategy.reduce(self._heldout.to(self.device), reduce_op="sum")
        self.log("val/loss", sums[1] / sums[0], prog_bar=True, sync_dist=True)
        self.log("val/loss_unconditional", sums[2] / sums[0], sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        notes = {name: str(value) for name, value in self.weights_metadata.items()}
        checkpoint["weights_metadata"] = {"network": notes}
