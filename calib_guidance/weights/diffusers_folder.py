"""Models in the folders that diffusers writes: a ``config.json`` beside the weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from calib_guidance.errors import CheckpointError, check_installed
from calib_guidance.weights.hub import FILES, PREFIX, fetch
from calib_guidance.weights.io import Weights, load_weights, read_weights

# Before diffusers 0.15, autoencoders named the parts of their attention otherwise; published files still do.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_folder(source: str) -> bool:
    """Whether ``source`` names a folder, here or on the Hugging Face hub, and not a file."""
    return Path(source).is_dir() or (source.startswith(PREFIX) and Path(source.split("@")[0]).suffix not in FILES)


def _inside(source: str, name: str) -> str:
    if not source.startswith(PREFIX):
        return str(Path(source) / name)
    repo, at, revision = source.partition("@")
    if "/" not in repo.removeprefix(PREFIX):
        raise CheckpointError(f"{source}: expected hf://OWNER/NAME, with /FOLDER or @REVISION behind it where needed")
    return f"{repo}/{name}{at}{revision}"


def _file(source: str, name: str) -> Path | None:
    """Where a file of the folder lies on this machine; None where the folder does not have it."""
    try:
        path = fetch(_inside(source, name))
    except CheckpointError as error:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cause = error.__cause__  # of the local kind where it may well be there, but not here and out of reach
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        raise
    return path if path.is_file() else None


def subfolder(source: str, name: str) -> str:
    """The part ``name`` of a pipeline's folder (``transformer``, ``vae``), or the folder itself where it is that part."""
    is_pipeline = _file(source, "model_index.json") is not None or (Path(source) / name).is_dir()
    return _inside(source, name) if is_pipeline else source


def read_config(source: str, kind: str) -> dict[str, Any]:
    """What ``config.json`` in a folder, or ``hf://OWNER/NAME[/FOLDER][@REVISION]``, says of its model of class ``kind``."""
    path = _file(source, "config.json")
    if path is None:
        raise CheckpointError(f"{source}: no config.json; name a folder of a {kind} of diffusers, or hf://OWNER/NAME")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    found = config.get("_class_name") if isinstance(config, Mapping) else None
    if found != kind:
        raise CheckpointError(f"{path} describes a {found}, expected a {kind}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _first(source: str, *names: str, cure: str) -> Path:
    """The first of these files that the folder has."""
    found = (_file(source, name) for name in names)
    if (path := next(filter(None, found), None)) is None:
        raise CheckpointError(f"{source}: neither {' nor '.join(names)} in it; {cure}")
    return path


def weights_file(source: str) -> Path:
    """The file of a folder's weights: safetensors where there is one, otherwise ``.bin``."""
    endings = "safetensors", "safetensors.index.json", "fp16.safetensors", "bin"
    return _first(
        source,
        *(f"diffusion_pytorch_model.{end}" for end in endings),
        cure="name the folder of a model of diffusers, or of its pipeline",
    )


def load_model(source: str | Mapping[str, Any], kind: str, part: str) -> nn.Module:
    """A diffusers model with the weights of its folder, or by its arguments with random ones.

    Args:
        source: folder, or ``hf://OWNER/NAME[/FOLDER][@REVISION]``, of the model or its pipeline. Or arguments.
        kind: its class, such as ``AutoencoderKL``.
        part: its folder in that of a pipeline, such as ``vae``.
    """
    check_installed("diffusers", "diffusers", kind)
    import diffusers  # seconds to import, and only models of this library need it

    build = getattr(diffusers, kind)
    if isinstance(source, Mapping):
        return build(**source).eval()
    source = subfolder(source, part)
    model = build.from_config(read_config(source, kind))
    state = {}
    for name, value in read_weights(weights_file(source)).state.items():
        if match := _OLD_ATTENTION.fullmatch(name):
            name = f"{match[1]}{_ATTENTION[match[2]]}.{match[3]}"
        state[name] = value
    load_weights(model, Weights(source, state))
    return model.eval()


def find_model(source: str, kinds: Mapping[str, str]) -> nn.Module:
    """The model of a folder or of its pipeline, of one of the classes ``kinds``, which names its folder in a pipeline."""
    found = []
    for part in dict.fromkeys(kinds.values()):
        path = _file(subfolder(source, part), "config.json")
        kind = path and json.loads(path.read_text()).get("_class_name")
        if kind in kinds:
            return load_model(source, kind, part)
        found += [kind] if kind else []
    known = ", ".join(kinds)
    found = list(dict.fromkeys(found))
    raise CheckpointError(f"{source}: found {', '.join(found) or 'no config.json of a model'}, expected one of {known}")


def has_part(source: str, name: str) -> bool:
    """Whether a pipeline's folder has the part ``name``."""
    return _file(_inside(source, name), "config.json") is not None


def scheduler_config(source: str) -> dict[str, Any]:
    """The configuration of the scheduler in a pipeline's folder or ``hf://OWNER/NAME``."""
    names = "scheduler/scheduler_config.json", "scheduler_config.json"
    return json.loads(_first(source, *names, cure="name the pipeline's folder, or give the scheduler").read_text())
