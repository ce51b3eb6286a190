"""Reading and writing weights. Nothing here executes what a file contains."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NESTS = ("state_dict", "model", "model_state_dict", "ema")


class CheckpointError(RuntimeError):
    """A weights file that is missing, unreadable or made for another architecture."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a weights file by name.

    Reads ``.safetensors``, and ``.pt``/``.pth``/``.ckpt`` files of torch.save without executing anything in them. Weights
    nested under ``state_dict`` or ``model`` are found, and a ``module.`` prefix of DataParallel is taken off.

    Raises:
        CheckpointError: no such file, not a weights file, or a file that holds more than tensors and plain containers.
    """
    path = Path(path)
    if path.name == "None":
        raise CheckpointError(
            "the weights file is named 'None': jsonargparse reads null on the command line as that text; write null in a YAML "
            "file and give it as another --config"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; name an existing one (see checkpoints/README.md)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: not a weights file that torch can read without executing code ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'})"
        ) from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, found {type(content).__name__}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" … and {len(names) - limit} more" if len(names) > limit else "")


def _check_notes(path: Path, expected: Mapping[str, object]) -> None:
    """Compare what a safetensors file says of its weights, where it says it, with what the configuration says."""
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
    for name, value in expected.items():
        if name in notes and notes[name] != str(value):
            raise CheckpointError(
                f"{path} was trained with {name}: {notes[name]}, the configuration says {name}: {value}. These weights would "
                f"load, and with another {name} be something else than was trained: set {name} to {notes[name]}"
            )


def load_weights(module: nn.Module, path: str | os.PathLike[str], **expected: object) -> None:
    """Load a weights file into a module, every name and shape of which must fit.

    Args:
        module: what to load into.
        path: weights file.
        expected: what the weights must have been trained with, where the file says so (see :func:`save_weights`).

    Raises:
        CheckpointError: naming the file, and each missing or unexpected name, wrong shape or other note.
    """
    state = read_state_dict(path)
    if Path(path).suffix == ".safetensors":
        _check_notes(Path(path), expected)
    load_state(module, state, path)


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights by name into a module, every name and shape of which must fit.

    Args:
        module: what to load into.
        state: the weights, by the module's names.
        path: where they come from, for the message.

    Raises:
        CheckpointError: naming the file, and each missing or unexpected name or wrong shape.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    shapes = sorted(
        f"{name} (file {tuple(state[name].shape)}, network {tuple(expected[name].shape)})"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    )
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}; " + "; ".join(problems) + ". Name the file that belongs to "
            "this architecture, or the architecture that belongs to this file"
        )
    module.load_state_dict(state)


def save_weights(weights: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], **notes: object) -> None:
    """Write weights as safetensors, complete or not at all (temporary file, then rename).

    Args:
        weights: a module, or tensors by name.
        path: file to write.
        notes: what shapes do not tell, kept as text in the file and checked when it is loaded.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(state, temporary, metadata={name: str(value) for name, value in notes.items()})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
