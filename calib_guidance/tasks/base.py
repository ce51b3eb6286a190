"""What the modules share: optimizers of those that train, and what is said of the classifier at the start."""

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier
from calib_guidance.training.inputs import NoDeepcopy

_GROSS = 0.5  # fraction of predicted classes


class TrainingTask(L.LightningModule):
    """Optimizer, learning-rate schedule (stepped at every optimizer step) and the logged loss of a module that trains.

    The callables that the command line makes of optimizers and rate schedules hold the full command line, with trainer and
    data. A weight average copies the module, and would copy those too, which under DDP fails at a lock of the launcher's.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None):
        super().__init__()
        self.optimizer, self.lr_scheduler = NoDeepcopy(optimizer), lr_scheduler and NoDeepcopy(lr_scheduler)

    def configure_optimizers(self) -> object:
        optimizer = self.optimizer.value(parameter for parameter in self.parameters() if parameter.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler.value(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        # Not where the scheduler is made: the number of steps asks for the loader, and one that is made before the checkpoint
        # has been read never learns where in the epoch to resume.
        scheduler = self.lr_schedulers()
        if getattr(scheduler, "total_steps", 0) is None:
            scheduler.total_steps = int(self.trainer.estimated_stepping_batches)

    def log_loss(self, loss: Tensor) -> Tensor:
        """Log the loss of a training step, on the CPU in the progress bar too.

        Loggers read it every ``log_every_n_steps`` steps. A progress bar reads what it shows after each, and a GPU would have
        nothing to do until then.
        """
        self.log("train/loss", loss, prog_bar=self.device.type == "cpu")
        return loss


def tell_smoothing(part: nn.Module, images: Tensor) -> None:
    """Say how much ``softplus_beta`` changes the outputs of a part's classifiers on ``images`` ``(N, C, H, W)``; warn if most."""
    for classifier in part.modules():
        if images.is_meta or not isinstance(classifier, OffTheShelfClassifier) or classifier.softplus_beta is None:
            continue
        changed, distance = classifier.smoothing_change(images)
        text = (
            f"softplus_beta {classifier.softplus_beta:g} in place of {', '.join(classifier.activations)} changes the class that "
            f"{classifier.weights_metadata['architecture']} predicts for {changed:.0%} of the first {len(images)} images, and "
            f"its probabilities by {distance:.2f} (mean total variation)"
        )
        if changed > _GROSS:
            rank_zero_warn(
                f"{text}: guidance follows what is left of the classifier; raise softplus_beta, or set it to null"
            )
        else:
            rank_zero_info(text)
