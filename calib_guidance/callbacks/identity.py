"""What a sample is a function of, beside its index: the identity of a run, by which two runs may share a folder or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn

from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.errors import ConfigurationError

# How much is done at a time, and by how many; up to rounding it changes nothing.
_NOT_PIXELS = {"compile", "decode_batch", "num_samples", "batch_size", "shard_size", "num_workers", "max_corrupt"}
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Key with dots and value of everything that is neither mapping nor list of such."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}")
    elif isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{key}.{number}")
    else:
        yield key, value


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return f"sha256 of the file {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Leaves of a part of the configuration; files by content, wherever they are, and those of weights not at all."""
    found: dict[str, Any] = {}
    for name, value in _leaves(config, key):
        if name.rpartition(".")[2] in _NOT_PIXELS:
            continue
        # Not whatever happens to lie in the working directory under the name of a setting.
        is_path = isinstance(value, str) and ("/" in value or Path(value).suffix or name.endswith(".labels"))
        path = Path(value) if is_path else None
        if path is not None and (path.suffix in _WEIGHTS or path.is_dir()) and path.exists() and key == "model":
            continue  # the weights that it was read into are hashed
        plain = value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
        found[name] = _file_hash(path) if path is not None and path.is_file() else plain
    return found


def _hash_state(module: nn.Module) -> str:
    """Of names, types, shapes and bytes of all that the module would save."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name.replace('_orig_mod.', '')} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


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
    """The identity of a run: dotted keys of the configuration, hashes of the loaded networks.

    In it: everything of ``model`` and ``data`` but how many samples there are and how many are made at a time, precision, and
    the rule of rounding to 8 bits. Not in it: devices, nodes, callbacks that only look, and where files are.

    Raises:
        ConfigurationError: the run was not started from a configuration.
    """
    config = _config(trainer)
    identity = _settings(config["model"], "model") | _settings(config["data"], "data")
    for name, module in pl_module.networks().items():
        identity[f"weights of {name}"] = _hash_state(module)
    return identity | {"trainer.precision": str(trainer.precision), "uint8_rule": uint8_rule}


def measurement_names(trainer: L.Trainer) -> dict[str, Measurement]:
    """The measurements of a run that keep something, by class and settings: what two runs have under one name goes together."""
    configured = [callback for callback in _config(trainer)["trainer"]["callbacks"] or [] if "class_path" in callback]
    names: dict[str, Measurement] = {}
    for callback in trainer.callbacks:
        if not isinstance(callback, Measurement) or not (callback.sums() or callback.rows()):
            continue
        kind = type(callback).__name__
        entry = next((c for c in configured if c["class_path"].rpartition(".")[2] == kind), None)
        settings: dict[str, Any] = {}
        if entry is not None:
            configured.remove(entry)
            settings = _settings(entry.get("init_args") or {}, "init_args")
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        names[f"{kind}-{digest}"] = callback
    return names
