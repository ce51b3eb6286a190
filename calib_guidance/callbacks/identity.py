"""What a sample is a function of, beside its index: the identity of a run, by which two runs may share a folder or not."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import identity


def _config(trainer: L.Trainer) -> dict[str, Any]:
    """The resolved configuration of the run.

    Raises:
        ConfigurationError: the run was not started from one.
    """
    saver = next((callback for callback in trainer.callbacks if isinstance(callback, SaveConfigCallback)), None)
    if saver is None:
        raise ConfigurationError(
            "SampleWriter stores what samples were made with, and finds it in the resolved configuration: sample with "
            "`calib-guidance predict`, or with calib_guidance.cli.commands.main from Python"
        )
    return saver.config.as_dict()


def run_identity(trainer: L.Trainer, pl_module: L.LightningModule, uint8_rule: str) -> dict[str, Any]:
    """Identity of a run, see :func:`calib_guidance.runs.identity.run_identity`.

    Raises:
        ConfigurationError: the run was not started from a configuration.
    """
    return identity.run_identity(_config(trainer), pl_module.networks(), str(trainer.precision), uint8_rule)


def measurement_names(trainer: L.Trainer) -> dict[str, Measurement]:
    """The measurements of a run that keep something, by class and settings: what two runs have under one name goes together."""
    configured = [callback for callback in _config(trainer)["trainer"]["callbacks"] or [] if "class_path" in callback]
    names: dict[str, Measurement] = {}
    for callback in trainer.callbacks:
        if not isinstance(callback, Measurement) or not (callback.sums() or callback.rows()):
            continue
        kind = type(callback).__name__
        entry = next((c for c in configured if c["class_path"].rpartition(".")[2] == kind), None)
        if entry is not None:
            configured.remove(entry)
        digest = identity.settings_digest((entry or {}).get("init_args") or {})
        names[f"{kind}-{digest}"] = callback
    return names
