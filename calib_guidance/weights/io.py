"""Reading and writing weights. Nothing here executes what a file contains."""

import argparse
import contextlib
import json
import math
import os
import unittest.mock
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.errors import CheckpointError, first_line
from calib_guidance.weights import registry
from calib_guidance.weights.cards import by_file, no_such_file
from calib_guidance.weights.hub import fetch
from calib_guidance.weights.pickles import read_edm_pickle

# Where trainers put the weights, averages first: they are what is sampled from.
_NESTS = ("ema", "state_dict_ema", "model_ema", "params_ema", "state_dict", "model", "model_state_dict", "params")
_DEPTH = 8
# A count for training only, which older files do not have, and DiT's table of positions, which diffusers computes.
_OPTIONAL = (".num_batches_tracked", "pos_embed.pos_embed")
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # what torch.save wrote first, before it wrote zip archives


class WeightsFile(str):
    """Path of a weights file, name that a library knows, or ``hf://…``; in a YAML, a path may be relative to that YAML."""

    @classmethod
    def beside(cls, value: str, folder: Path) -> Self:
        """The file of a folder that ``value`` names, if there is one; else ``value``."""
        path = folder.absolute() / value
        return cls(path if path.is_file() else value)


class Weights(NamedTuple):
    """What was read of a weights file, or folder."""

    path: Path | str
    state: dict[str, Tensor]
    metadata: Mapping[str, str] = {}  # settings that the file states, where this project wrote it
    parts: Mapping[str, Mapping[str, str]] | None = (
        None  # of a Lightning checkpoint alone, metadata by path of the part
    )
    arguments: Mapping[str, Any] = {}  # of an EDM pickle, what the network was made with


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """While libraries load weights in their own ways, torch.load executes nothing, whatever they ask of it."""
    with unittest.mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        yield


def _reason(error: BaseException) -> str:
    # torch.load begins with the advice to execute what is in the file; what it refuses stands further down.
    lines = str(error).splitlines()
    refused = (line.strip() for line in lines if "GLOBAL" in line or "WeightsUnpickler error" in line)
    return f"{type(error).__name__}: {next(refused, first_line(error))}"


def _what_else(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file: the download or the disk failed"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download got an error or a log-in page; fetch the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: run `git lfs pull` where it came from"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive: unpack it"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    return f"a file that begins with {head[:12]!r}"


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            return Weights(path, load_file(path), file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, perhaps a truncated one ({error})") from error


def _read_folder(path: Path) -> Weights:
    """A folder of diffusers or transformers: one safetensors file, or several with an index."""
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _read_shards(indices[0])
    usual = [file for file in files if file.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if len(usual or files) != 1:
        found = ", ".join(file.name for file in [*indices, *files]) or "none"
        raise CheckpointError(f"{path}: expected one .safetensors(.index.json) in it, found {found}: name the file")
    return _read_safetensors((usual or files)[0])


def _read_shards(index: Path) -> Weights:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
        if any(name != Path(name).name for name in shards):
            raise ValueError(f"names files outside of its folder ({_some(shards)})")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of sharded weights ({_reason(error)})") from error
    if lacking := [name for name in shards if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index}: {len(lacking)} of {len(shards)} shards are missing: {_some(lacking)}")
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= _read_safetensors(index.parent / name).state
    if state.keys() != places.keys():
        wrong = sorted(state.keys() ^ places.keys())
        raise CheckpointError(f"{index}: the shards do not hold what it lists: {_some(wrong)}")
    return Weights(index, state)


def _tensors(content: object) -> dict[str, Tensor] | None:
    """A mapping of names to tensors, without what modules keep beside them; None for anything else."""
    if not isinstance(content, Mapping):
        return None
    state = {name: value for name, value in content.items() if not str(name).endswith("_extra_state")}
    return state if state and all(isinstance(value, Tensor) for value in state.values()) else None


def _read_torch(path: Path, is_archive: bool, part: str | None = None) -> Weights:
    # Mapped, so that loading holds the weights in memory once.
    with torch.serialization.safe_globals([argparse.Namespace]):  # in which training scripts keep their options
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    outermost = content
    for _ in range(_DEPTH):  # a mapping may hold itself
        nested = [content[name] for name in (part, *_NESTS) if isinstance(content, Mapping) and name in content]
        if _tensors(content) is not None or not nested:
            break
        content = next((part for part in nested if _tensors(part) is not None), nested[0])
    state = _tensors(content)
    if state is None:
        is_mapping = isinstance(content, Mapping)
        found = f"a mapping with {_some(sorted(map(str, content)))}" if is_mapping else type(content).__name__
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, found {found}")
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if name != "n_averaged"}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    parts = outermost.get("weights_metadata", {}) if "pytorch-lightning_version" in outermost else None
    return Weights(path, state, parts=parts)


def read_weights(path: str | os.PathLike[str], part: str | None = None) -> Weights:
    """What is in a weights file, without executing anything in it; NaN is refused.

    Reads ``.safetensors``; folders of them with an index, as diffusers writes them; files of torch.save in both of its formats,
    with weights nested under ``state_dict``, ``model``, ``params`` or ``ema`` (averages are preferred) and the prefixes of
    DataParallel, ``torch.compile`` and averages taken off; pickles of EDM (``ema``); and ``hf://OWNER/REPO/PATH`` of the hub.
    Of a file of torch.save ``part`` is preferred to all of these, where it has it.
    """
    weights = _read(path, part)

    def below_inf(value: Tensor) -> bool:  # masks of attention may hold −inf
        return bool(((value.float() if value.element_size() == 1 else value) < math.inf).all())

    if broken := [name for name, v in weights.state.items() if v.is_floating_point() and not below_inf(v)]:
        raise CheckpointError(
            f"{weights.path} holds NaN or infinity: {_some(broken)}. Its training diverged, or it is damaged: name another"
        )
    return weights


def _read(path: str | os.PathLike[str], part: str | None = None) -> Weights:
    if Path(path).name == "None":
        raise CheckpointError(
            "a weights file named 'None': on the command line null is text. Write it in a YAML file and add --config FILE"
        )
    path = fetch(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise no_such_file(path)
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return _read_safetensors(path)
    is_archive = head.startswith(b"PK\x03\x04")
    if not is_archive and not head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: expected weights (torch, safetensors or EDM pickle), found {_what_else(head)}")
    try:
        if is_archive or _LEGACY_MAGIC in head[:32]:
            return _read_torch(path, is_archive, part)
        with open(path, "rb") as file:
            state, arguments = read_edm_pickle(file)
        return Weights(path, state, arguments=arguments)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle fails in as many ways as there are opcodes
        raise CheckpointError(
            f"{path}: not a weights file that can be read without executing code, or a truncated one ({_reason(error)})"
        ) from error


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" … and {len(names) - limit} more" if len(names) > limit else "")


def part_of(weights: Weights, module: nn.Module) -> Weights:
    """The one part of the weights that fits a module by names and shapes, below a prefix such as ``model.``.

    Where none fits, other files than Lightning's are returned as they are.
    """
    expected = {name: value.shape for name, value in module.state_dict().items()}
    needed = [name for name in expected if not name.endswith(_OPTIONAL)]
    if not needed or (weights.parts is None and any(name in weights.state for name in needed)):
        return weights
    fitting, names = [], list(weights.state)
    for prefix in [name.removesuffix(needed[0]) for name in names if f".{name}".endswith(f".{needed[0]}")]:
        part = {name.removeprefix(prefix): value for name, value in weights.state.items() if name.startswith(prefix)}
        if part.keys() >= {*needed} and all(value.shape == expected.get(name) for name, value in part.items()):
            fitting.append((prefix, part))
    if len(fitting) == 1:
        ((prefix, part),) = fitting
        metadata = weights.metadata if weights.parts is None else weights.parts.get(prefix.rstrip("."), {})
        return weights._replace(state=part, metadata=metadata, parts=None)
    if weights.parts is None:
        return weights
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    several = f"several parts fit: {', '.join(prefix.rstrip('.') for prefix, _ in fitting)}"
    raise CheckpointError(
        f"{weights.path} is a training checkpoint in which {several if fitting else 'no part fits'} {type(module).__name__} "
        f"by names and shapes (it has {_some(parts, 4)}): name the weights that ExportWeights or ExportClassifier wrote, or the "
        "architecture that was trained"
    )


def load_weights(
    module: nn.Module, source: str | os.PathLike[str] | Weights, kind: str | None = None, **settings: object
) -> dict[str, object]:
    """Load a weights file, or what was read of one, into a module; every name and shape must fit.

    ``settings`` such as ``noise_schedule``, which shapes do not tell, are compared with what the file says of itself and, where
    it is a published one (of ``kind``), with how that was made (:mod:`calib_guidance.weights.registry`). Of a training
    checkpoint the part that fits is taken.

    Returns:
        Provenance for the report of a run: ``file``, ``bytes``, ``published`` (names that have these shapes) and settings.
    """
    weights = part_of(source if isinstance(source, Weights) else read_weights(source), module)
    settings = settings | registry.nonstate_hparams(module)
    for name, value in settings.items():
        if (was := weights.metadata.get(name, str(value))) != str(value):
            said = f"was trained with {name}: {was}, the configuration says {name}: {value}"
            raise CheckpointError(f"{weights.path} {said}. It would load and compute something else: set {name}: {was}")
    named = by_file(weights.path)
    if named is not None and kind not in (None, named.kind) and named.name in registry.identify(weights.state):
        raise CheckpointError(f"{weights.path} is {named.name} by its name and shapes: {named.used_by} takes it")
    names = registry.identify(weights.state, kind, weights.path)
    state, expected = dict(weights.state), module.state_dict()
    state |= {name: expected[name] for name in expected.keys() - state.keys() if name.endswith(_OPTIONAL)}
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {
            f"{name} (file {tuple(state[name].shape)}, network {tuple(expected[name].shape)})"
            for name in expected.keys() & state.keys()
            if state[name].shape != expected[name].shape
        },
    }
    if any(problems.values()):
        wrong = "; ".join(f"{what}: {_some(sorted(which))}" for what, which in problems.items() if which)
        known = f" (the file has the names and shapes of {' or '.join(names)})" if names else ""
        raise CheckpointError(
            f"{weights.path} does not fit {type(module).__name__}; {wrong}{known}. Name the file of this architecture, or the "
            "architecture of this file (network)"
        )
    if integer := [n for n, v in state.items() if expected[n].is_floating_point() and not v.is_floating_point()]:
        raise CheckpointError(
            f"{weights.path} holds {state[integer[0]].dtype} where {type(module).__name__} has {expected[integer[0]].dtype}: "
            f"{_some(integer)}. Quantized weights are not read: name the file before quantization"
        )
    if card := registry.common_card(names):  # what the file says of itself was compared above: it may be another one
        registry.check(card.name, {k: v for k, v in settings.items() if k not in weights.metadata}, weights.path)
    module.load_state_dict(state)
    size = sum(value.numel() * value.element_size() for value in state.values())
    return {"file": str(weights.path), "bytes": size, "published": names} | settings


def in_half(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights in float16, to be written to ``path``; CheckpointError where one is too large for it."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if large := [name for name, value in state.items() if value.isfinite().all() and not half[name].isfinite().all()]:
        raise CheckpointError(f"{path}: {large[0]} has values above float16's 65,504; write float32")
    return half


def save_weights(
    weights: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], /, **metadata: object
) -> None:
    """Write weights as safetensors, atomically, with ``metadata``: what shapes do not tell, checked when it is loaded."""
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as file:
        # save_file would make a file that only its owner can read
        file.write(save(state, metadata={name: str(value) for name, value in metadata.items()}))
