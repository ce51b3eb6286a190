"""Fine-tuning of classifiers for calibrated confidence."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from calib_guidance.classifiers.base import Classifier
from calib_guidance.data.base import listed
from calib_guidance.data.imagenet import read_class_names, same_classes
from calib_guidance.errors import ConfigurationError, check_choice
from calib_guidance.metrics import ClassifierMetrics, Levels
from calib_guidance.tasks.base import TrainingTask, tell_smoothing
from calib_guidance.training import binned_smooth_ece, smooth_ece
from calib_guidance.training.inputs import CleanInput, InputTransform

SmoothECEForm = Literal["per_sample", "binned"]
HELDOUT_SEED = 0  # of the noise on held-out images: the same at every validation and on any number of ranks


class CalibrateClassifier(TrainingTask):
    """Trains a classifier with cross-entropy + λ·Smooth ECE on clean, noisy or denoised images (arXiv 2511.05844 Eq. 1).

    Held-out data are measured overall and by noise level: ``val/nll``, ``val/ece`` … and ``val/ece/t=0-99`` …, with the
    names of :class:`~calib_guidance.metrics.ClassifierMetrics`. The weights' average, where one is wanted, comes from
    Lightning's ``EMAWeightAveraging`` callback.

    Args:
        classifier: what to train, as guidance will use it.
        input_transform: makes what the classifier sees from a batch of images, see :mod:`calib_guidance.training.inputs`; clean
            images by default.
        smooth_ece_weight: λ ≥ 0; 0 is plain cross-entropy.
        smooth_ece_beta: β > 0 of the Smooth ECE.
        smooth_ece_form: ``per_sample`` or ``binned`` (over the batches of all devices, see :mod:`calib_guidance.training`).
        smooth_ece_warmup_steps: optimizer steps over which λ grows linearly from 0.
        label_smoothing: of the cross-entropy, in [0, 1].
        freeze: name patterns of the classifier's parameters to keep as they are, e.g. ``network.layer1.*``; layers with
            nothing left to train (and their BatchNorm statistics) stay in evaluation mode.
        num_levels: equal ranges of t by which held-out data are measured.
        channels_last: lay weights and images out channels-last, as convolutions of half precision want them on GPUs; None
            does so on GPUs.
        compile: compile the classifier with torch.compile; its parameters keep their names.
        optimizer: builds the optimizer.
        lr_scheduler: builds the rate schedule, stepped at every optimizer step; none by default.
    """

    def __init__(
        self,
        classifier: Classifier,
        input_transform: InputTransform | None = None,
        smooth_ece_weight: float = 0.0,
        smooth_ece_beta: float = 1e-2,
        smooth_ece_form: SmoothECEForm = "per_sample",
        smooth_ece_warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        freeze: Sequence[str] = (),
        num_levels: int = 10,
        channels_last: bool | None = None,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__(optimizer, lr_scheduler)
        if not smooth_ece_weight >= 0:
            raise ValueError(f"smooth_ece_weight (λ) must be at least 0, got {smooth_ece_weight}")
        if not smooth_ece_beta > 0:
            raise ValueError(f"smooth_ece_beta (β) must be above 0, got {smooth_ece_beta}")
        check_choice("smooth_ece_form", smooth_ece_form, get_args(SmoothECEForm))
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        if smooth_ece_warmup_steps < 0:
            raise ValueError(f"smooth_ece_warmup_steps must be at least 0, got {smooth_ece_warmup_steps}")
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.classifier, self.input_transform = classifier, input_transform or CleanInput()
        self.smooth_ece_weight, self.smooth_ece_beta = smooth_ece_weight, smooth_ece_beta
        self.smooth_ece_form, self.smooth_ece_warmup_steps = smooth_ece_form, smooth_ece_warmup_steps
        self.label_smoothing, self.num_levels = label_smoothing, num_levels
        self.channels_last, self._told_smoothing = channels_last, False
        self.metrics = ClassifierMetrics(classifier.num_classes, num_levels)
        self._freeze(freeze)
        if compile:
            classifier.compile()

    def _freeze(self, patterns: Sequence[str]) -> None:
        names = [name for name, _ in self.classifier.named_parameters()]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"freeze: {pattern!r} fits no parameter; they are named {', '.join(names[:6])} …")
        frozen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
        if len(frozen) == len(names):
            raise ValueError(f"freeze: {list(patterns)} leaves nothing to train")
        for name in frozen:
            self.classifier.get_parameter(name).requires_grad_(False)

    def setup(self, stage: str) -> None:
        if self.channels_last is None:
            self.channels_last = self.trainer.strategy.root_device.type == "cuda"
        if self.channels_last:
            self.classifier.to(memory_format=torch.channels_last)
        data = self.trainer.datamodule
        classes = getattr(data, "num_classes", None)
        if classes not in (None, self.classifier.num_classes):
            raise ConfigurationError(
                f"the data has {classes} classes, the classifier {self.classifier.num_classes}: set "
                f"model.classifier.num_classes (or its network's) to {classes}"
            )
        known = read_class_names(self.classifier.class_names, self.classifier.num_classes)
        if not same_classes(known, names := getattr(data, "class_names", None)):
            raise ConfigurationError(
                f"the data numbers the classes {listed(names)}, the classifier {listed(known)}: equal numbers must mean equal "
                "classes. Name class folders alike, or set model.classifier.class_names to null"
            )
        self.input_transform.check_classes(self.classifier.num_classes)
        if (shape := getattr(data, "image_shape", None)) is not None:
            try:
                self.input_transform.check_image(shape)
                self.classifier.check_image(shape)
            except ValueError as error:
                raise ConfigurationError(str(error)) from error

    def on_fit_start(self) -> None:
        for module in self.classifier.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def level_range(self, level: int) -> str:
        """The steps of a noise level as text, e.g. ``0-99``."""
        steps = self.input_transform.num_steps
        low, high = (-(-k * steps // self.num_levels) for k in (level, level + 1))
        return f"{low}-{high - 1}"

    def score_names(self, stage: str) -> list[str]:
        """Names under which the scores of held-out data can be logged: overall, and by noise level where t varies."""
        ranges = [self.level_range(k) for k in range(self.num_levels)] if self.num_levels > 1 else []
        names = [f"{stage}/{name}" for name in self.metrics if name != "bins"]
        return names + [f"{name}/t={text}" for name in names for text in ranges]

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Scalar objective of logits ``(N, K)`` and classes ``(N,)``."""
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing)
        if self.smooth_ece_weight:
            form = smooth_ece if self.smooth_ece_form == "per_sample" else binned_smooth_ece
            warmup = self.smooth_ece_warmup_steps
            weight = self.smooth_ece_weight * (min(1.0, self.global_step / warmup) if warmup else 1.0)
            loss = loss + weight * form(logits, y, self.smooth_ece_beta)
        return loss

    def _logits(self, batch: dict[str, Tensor], seed: int | None = None) -> tuple[Tensor, Tensor | None]:
        x, t = self.input_transform(batch, seed)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not (self.training or self._told_smoothing):  # statistics of a training batch would be counted twice
            self._told_smoothing = True
            tell_smoothing(self.classifier, x)
        return self.classifier(x, t), t

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, _ = self._logits(batch)
        return self.log_loss(self.loss(logits, batch["label"]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures one batch; callbacks get its logits ``(N, K)``, labels and noise levels ``(N,)``."""
        logits, t = self._logits(batch, HELDOUT_SEED)
        y = batch["label"]
        level = torch.zeros_like(y) if t is None else t * self.num_levels // self.input_transform.num_steps
        self.metrics.update(logits.float(), y, level)
        return {"logits": logits.float(), "label": y, "level": level}

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()

    def on_validation_epoch_end(self) -> None:
        values = {}
        for name, (overall, by_level) in self.measured().items():
            values[name] = overall
            known = (~by_level.isnan()).nonzero().flatten().tolist()
            if len(known) > 1:
                values |= {f"{name}/t={self.level_range(k)}": by_level[k] for k in known}
        stage = "test" if self.trainer.testing else "val"
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("nll", "accuracy", "ece"), sync_dist=True)

    test_step = validation_step
    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def measured(self) -> dict[str, Levels]:
        """Every measure of the held-out data seen since the last validation or test began, over all ranks."""
        return {name: value for name, value in self.metrics.compute().items() if name != "bins"}

    def reliability(self) -> Tensor:
        """Bins ``(num_levels, num_bins, 3)`` of the same data, over all ranks: count, summed confidence, number correct."""
        return self.metrics.compute()["bins"].by_level

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        notes = getattr(self.classifier, "weights_metadata", {})
        checkpoint["weights_metadata"] = {"classifier.network": {name: str(value) for name, value in notes.items()}}
