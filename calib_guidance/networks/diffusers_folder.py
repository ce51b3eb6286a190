"""Models in the folders that diffusers writes: a ``config.json`` beside the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calib_guidance.checkpoints import CheckpointError, load_state, read_state_dict

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Before diffusers 0.15, autoencoders named the parts of their attention otherwise; published files still do.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_folder(source: str) -> bool:
    """Whether ``source`` names a folder, here or on the Hugging Face hub, and not a file."""
    return Path(source).is_dir() or (source.startswith("hf://") and Path(source.split("@")[0]).suffix not in _FILES)


def _hub_file(source: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    match = _HUB.fullmatch(source)
    if not match:
        raise CheckpointError(f"{source}: expected hf://OWNER/NAME, with /FOLDER or @REVISION behind it where needed")
    try:
        folder, revision = match["folder"], match["revision"]
        return Path(hf_hub_download(match["repo"], name, subfolder=folder, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: cannot get {name} from the Hugging Face hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Without a connection, name a folder on this machine; where the repository is gated, log in first"
        ) from error


def _file(source: str, name: str) -> Path | None:
    if source.startswith("hf://"):
        return _hub_file(source, name)
    path = Path(source) / name
    return path if path.is_file() else None


def subfolder(source: str, name: str) -> str:
    """The part ``name`` of a pipeline's folder (``transformer``, ``vae``), or the folder itself where it is that part."""
    if _file(source, "model_index.json") is None and not (Path(source) / name).is_dir():
        return source
    repo, at, revision = source.partition("@")
    return f"{repo}/{name}{at}{revision}"


def read_config(source: str, kind: str) -> dict[str, Any]:
    """What a folder's ``config.json`` says of its model.

    Args:
        source: folder, or ``hf://OWNER/NAME[/FOLDER][@REVISION]``.
        kind: class that it must be of.

    Raises:
        CheckpointError: there is none, it is not JSON, or it is of another class.
    """
    path = _file(source, "config.json")
    if path is None:
        raise CheckpointError(
            f"{source}: no config.json; expected a folder that diffusers wrote for a {kind}, or hf://OWNER/NAME for one of the "
            "Hugging Face hub"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    found = config.get("_class_name") if isinstance(config, Mapping) else None
    if found != kind:
        raise CheckpointError(f"{path} describes a {found}, expected a {kind}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def read_weights(source: str) -> dict[str, Tensor]:
    """Tensors of a folder by name: safetensors where there are any, otherwise ``.bin``, of which nothing is executed.

    Raises:
        CheckpointError: neither is there, or it cannot be read.
    """
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        path = _file(source, name)
        if path is not None:
            return read_state_dict(path)
    raise CheckpointError(
        f"{source}: neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.bin in it"
    )


def load_autoencoder(source: str | Mapping[str, Any], kind: str) -> nn.Module:
    """An autoencoder with the weights of its folder, or by its arguments with random ones.

    Args:
        source: folder, or ``hf://OWNER/NAME[/FOLDER][@REVISION]``; of a pipeline's folder, its ``vae`` is taken. Or arguments.
        kind: ``AutoencoderKL`` or ``AutoencoderTiny``.

    Raises:
        CheckpointError: the folder holds no such model, or its weights do not fit its configuration.
    """
    import diffusers  # seconds to import, and only latent models need it

    build = getattr(diffusers, kind)
    if isinstance(source, Mapping):
        return build(**source).eval()
    source = subfolder(source, "vae")
    model = build.from_config(read_config(source, kind))
    state = {}
    for name, value in read_weights(source).items():
        if match := _OLD_ATTENTION.fullmatch(name):
            name = f"{match[1]}{_ATTENTION[match[2]]}.{match[3]}"
        state[name] = value
    load_state(model, state, source)
    return model.eval()
