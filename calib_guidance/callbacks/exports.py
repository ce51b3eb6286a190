"""What was trained, in the format that ``predict`` configurations name."""

import itertools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
import yaml
from torch import Tensor

from calib_guidance.backend.atomic import write_text
from calib_guidance.classifiers.temperature import BOUNDS, fit_temperature
from calib_guidance.errors import ConfigurationError, check_choice
from calib_guidance.metrics import CalibrationError, NegativeLogLikelihood
from calib_guidance.weights.io import in_half, save_weights

log = logging.getLogger(__name__)
Mode = Literal["min", "max"]
FittedTemperature = Literal["none", "scalar", "by_level"]
_WEIGHTS_OPTION = {"OffTheShelfClassifier": "weights", "NoiseAwareClassifier": "checkpoint"}


def _below_root(path: str) -> str:
    """A safetensors file below the trainer's default_root_dir, as an option names it."""
    if not path.endswith(".safetensors"):
        raise ConfigurationError(f"path: expected a .safetensors file, got {path!r}")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ConfigurationError(
            f"path: exports go below trainer.default_root_dir, got {path!r}: set it to {Path(path).name}, and copy the file"
        )
    return path


class ExportWeights(L.Callback):
    """Writes the network's weights at the end of ``fit`` (the average, where one is kept) as safetensors.

    The file keeps the module's ``weights_metadata``, what shapes do not tell. List this callback after the one that averages the
    weights: callbacks run in the order of the list.

    Args:
        path: file to write, relative to the trainer's default_root_dir; an existing one is replaced atomically.
        module: attribute path of what to write, e.g. ``network`` or ``classifier.network``.
    """

    def __init__(self, path: str = "network.safetensors", module: str = "network"):
        self.path, self.module = _below_root(path), module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.get_submodule(self.module)  # a wrong name fails before training, not after

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = Path(trainer.default_root_dir, self.path)
            save_weights(pl_module.get_submodule(self.module), path, **getattr(pl_module, "weights_metadata", {}))
            print(f"wrote {path}")


class ExportClassifier(L.Callback):
    """Writes the classifier with the best validation score, or the last one, as safetensors and a YAML beside it.

    A ``predict`` configuration names the YAML, ``classifier: path/of/it.yaml``. Architecture, number of classes, preprocessing
    and temperature stand in both files, and loading compares them. With an average of the weights (``EMAWeightAveraging``) the
    average is what was validated and is exported. ``calib-guidance validate`` exports without training: temperature scaling
    of a classifier as it is.

    Args:
        path: safetensors file to write, relative to the trainer's default_root_dir, ``classifier.safetensors`` by default; an
            existing one is replaced atomically.
        monitor: name of a logged score, e.g. ``val/nll``, ``val/ece``, ``val/ece/t=0-99``; None exports after every
            validation, so that the last one stays.
        mode: ``min`` or ``max``: what is best.
        temperature: ``none``; ``scalar`` or ``by_level`` (one for each of the module's noise levels), fitted on the
            validation data (Guo et al. 2017).
        half: write float16 in place of float32.
    """

    def __init__(
        self,
        path: str | None = None,
        monitor: str | None = "val/nll",
        mode: Mode = "min",
        temperature: FittedTemperature = "none",
        half: bool = False,
    ):
        check_choice("mode", mode, get_args(Mode))
        check_choice("temperature", temperature, get_args(FittedTemperature))
        self.path = _below_root(path or "classifier.safetensors")
        self.monitor, self.mode, self.temperature, self.half = monitor, mode, temperature, half
        self.best = math.inf
        self.validated = 0  # step of the last validation
        self._seen: list[dict[str, Tensor]] = []
        self._weights: dict[str, Tensor] = {}
        self._configured: dict[str, Any] | None = None

    def configure_run(self, configuration: Mapping[str, Any]) -> None:
        """Take the classifier's part of the configuration, which :meth:`on_validation_end` writes beside the weights."""
        if "classifier" in configuration["model"].get("init_args", {}):
            self._configured = json.loads(json.dumps(configuration["model"]["init_args"]["classifier"], default=str))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        self.target = Path(trainer.default_root_dir, self.path)
        classifier = pl_module.classifier
        if type(classifier).__name__ not in _WEIGHTS_OPTION:
            raise ConfigurationError(
                f"ExportClassifier knows {' and '.join(_WEIGHTS_OPTION)}, not {type(classifier).__name__}"
            )
        if self.temperature != "none" and classifier.temperature != 1.0:
            raise ConfigurationError(
                f"the classifier already has the temperature {classifier.temperature}: set its temperature to 1 to fit one"
            )
        if self.monitor is not None and self.monitor not in (known := pl_module.score_names("val")):
            raise ConfigurationError(
                f"ExportClassifier's monitor {self.monitor!r} is not a score of the validation; known: {', '.join(known)}"
            )

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            # While validation runs the module holds the average of the weights, where one is kept, and at its end it may
            # already hold the trained ones again.
            state = pl_module.classifier.network.state_dict()
            self._weights = {name: value.detach().cpu().clone() for name, value in state.items()}
            self._seen = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *_: Any
    ) -> None:
        if self.temperature != "none" and not trainer.sanity_checking:
            self._seen.append({name: value.detach().cpu() for name, value in outputs.items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.global_step
        # As rank 0 sees it: the statistics of BatchNorm may differ.
        if trainer.sanity_checking or not trainer.strategy.broadcast(self._improved(trainer)):
            return
        temperature = self._fit_temperature(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._write(trainer, pl_module, temperature)
            score = self.monitor and f", {self.monitor} {float(trainer.callback_metrics[self.monitor]):.4g}"
            print(f"wrote {self.target} and .yaml (step {trainer.global_step}{score or ''})")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run and trainer.global_step > self.validated:
            after = f"after the validation at step {self.validated:,}" if self.validated else "without any validation"
            log.warning(
                f"steps up to {trainer.global_step:,} {after} are not in {self.target}: let training end with a validation "
                "(trainer.max_steps or max_epochs a multiple of val_check_interval or check_val_every_n_epoch)"
            )

    def _improved(self, trainer: L.Trainer) -> bool:
        wrong = (name for name, value in self._weights.items() if not value.isfinite().all())
        if (name := next(wrong, None)) is not None:
            log.warning(f"{name} is not finite after step {trainer.global_step}: this classifier is not exported")
            return False
        if self.monitor is None:
            return True
        if self.monitor not in trainer.callback_metrics:
            raise ConfigurationError(f"ExportClassifier's monitor {self.monitor!r}: no validation image has such a t")
        score = float(trainer.callback_metrics[self.monitor]) * (1 if self.mode == "min" else -1)
        if math.isnan(score):
            log.warning(f"{self.monitor} is NaN after step {trainer.global_step}: this classifier is not exported")
            return False
        improved, self.best = score < self.best, min(score, self.best)
        return improved

    def _fit_temperature(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | list[float]:
        if self.temperature == "none":
            return pl_module.classifier.temperature
        device = trainer.strategy.root_device
        none = {
            key: torch.zeros(0, dtype=torch.long) for key in ("level", "label")
        }  # of a rank without validation data
        none["logits"] = torch.zeros(0, pl_module.classifier.num_classes)
        level, y, logits = (torch.cat([none[key], *(seen[key] for seen in self._seen)]) for key in none)
        num_levels = pl_module.num_levels if self.temperature == "by_level" else 1
        level = level if num_levels > 1 else torch.zeros_like(level)
        fitted = fit_temperature(
            logits, y, level, num_levels, lambda sums: trainer.strategy.reduce(sums.to(device), reduce_op="sum")
        )
        if not (finite := logits.isfinite().all(1)).all():
            log.warning(
                f"{int((~finite).sum())} held-out samples whose logits are not finite do not count for the temperature"
            )
        logits, y, level = (each[finite].to(device) for each in (logits, y, level))
        metrics = NegativeLogLikelihood(num_levels), CalibrationError(num_levels=num_levels)
        measured = []
        for metric, each in itertools.product(metrics, (logits, logits / fitted.to(device)[level].unsqueeze(1))):
            metric.to(device).reset()
            metric.update(each, y, level)
            measured.append(metric.compute().by_level.tolist())
        values = [round(value, 6) for value in fitted.tolist()]
        if trainer.is_global_zero:
            names = [f"t = {pl_module.level_range(k)}" for k in range(num_levels)] if num_levels > 1 else ["all t"]
            print(f"\n{'temperature':<16}{'T':>8}{'NLL':>8}{'→':>9}{'ECE':>8}{'→':>9}")
            for row in zip(names, fitted.tolist(), *measured, strict=True):
                print("{:<16}{:>8.3f}{:>8.4f}{:>9.4f}{:>8.4f}{:>9.4f}".format(*row))
            if at_bound := [name for name, value in zip(names, fitted.tolist(), strict=True) if value in BOUNDS]:
                log.warning(
                    f"the temperature of {', '.join(at_bound)} is at a bound ({BOUNDS[0]:g} or {BOUNDS[1]:g}): the held-out data "
                    "do not determine it. Use more of them, or fewer noise levels (num_levels)"
                )
        return values[0] if len(values) == 1 else values

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, temperature: float | list[float]) -> None:
        classifier = pl_module.classifier
        tempered: dict[str, object] = {"temperature": temperature}
        if isinstance(temperature, list):
            tempered["num_steps"] = pl_module.input_transform.num_steps
        weights = in_half(self._weights, self.target) if self.half else self._weights
        save_weights(weights, self.target, **classifier.weights_metadata | tempered)
        if self._configured is None:
            return
        replaced = {_WEIGHTS_OPTION[type(classifier).__name__]: self.target.name} | tempered
        if names := getattr(trainer.datamodule, "class_names", None):
            replaced["class_names"] = "imagenet" if trainer.datamodule.classes == "imagenet" else names
        description = self._configured | {"init_args": self._configured.get("init_args", {}) | replaced}
        text = f"# `classifier:` of a predict configuration, written by calib-guidance {trainer.state.fn.value}.\n"
        write_text(self.target.with_suffix(".yaml"), text + yaml.safe_dump(description, sort_keys=False))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = state_dict.get("validated", 0)
        self.best = min(math.inf, state_dict["best"])  # inf for NaN, which older versions took for the best
