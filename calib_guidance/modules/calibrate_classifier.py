"""Fine-tuning a classifier so that its confidence is honest."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from calib_guidance.classifiers.base import Classifier
from calib_guidance.data.noising import Clean
from calib_guidance.losses import smooth_ece
from calib_guidance.metrics.calibration import CalibrationError


class CalibrateClassifier(L.LightningModule):
    """Cross-entropy + λ·Smooth ECE on clean or noisy images (arXiv 2511.05844 Eq. 1).

    Args:
        classifier: what to train, as guidance will use it.
        noising: makes what the classifier sees from clean images, :class:`~calib_guidance.data.noising.Clean` by default.
        smooth_ece_weight: λ ≥ 0; 0 is plain cross-entropy.
        smooth_ece_beta: β > 0 of the Smooth ECE.
        label_smoothing: of the cross-entropy, in [0, 1].
        optimizer: builds the optimizer.
        lr_scheduler: builds the rate schedule, stepped at every optimizer step; none by default.

    Raises:
        ValueError: λ, β or the smoothing out of range.
    """

    def __init__(
        self,
        classifier: Classifier,
        noising: nn.Module | None = None,
        smooth_ece_weight: float = 0.0,
        smooth_ece_beta: float = 1e-2,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__()
        if smooth_ece_weight < 0:
            raise ValueError(f"smooth_ece_weight (λ) must be at least 0, got {smooth_ece_weight}")
        if not smooth_ece_beta > 0:
            raise ValueError(f"smooth_ece_beta (β) must be above 0, got {smooth_ece_beta}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.classifier, self.noising = classifier, noising or Clean()
        self.smooth_ece_weight, self.smooth_ece_beta = smooth_ece_weight, smooth_ece_beta
        self.label_smoothing, self.optimizer, self.lr_scheduler = label_smoothing, optimizer, lr_scheduler
        self.val_ece = CalibrationError()

    def setup(self, stage: str) -> None:
        classes = getattr(self.trainer.datamodule, "num_classes", self.classifier.num_classes)
        if classes != self.classifier.num_classes:
            raise ValueError(
                f"the data has {classes} classes, the classifier {self.classifier.num_classes}: set "
                f"model.init_args.classifier.init_args.num_classes (or its network's) to {classes}"
            )

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Scalar objective of logits ``(N, K)`` and classes ``(N,)``."""
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing)
        if self.smooth_ece_weight:
            loss = loss + self.smooth_ece_weight * smooth_ece(logits, y, self.smooth_ece_beta)
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.classifier(*self.noising(batch))
        loss = self.loss(logits, batch["label"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        y = batch["label"]
        logits = self.classifier(*self.noising(batch, seed=0)).float()  # the same noise at every validation
        self.val_ece.update(logits, y)
        values = {"val/nll": F.cross_entropy(logits, y), "val/accuracy": (logits.argmax(1) == y).float().mean()}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(y))
        self.log("val/ece", self.val_ece, prog_bar=True)

    def configure_optimizers(self) -> object:
        optimizer = self.optimizer(self.classifier.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}
