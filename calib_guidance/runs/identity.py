"""Identity of a run: everything that a sample is a function of beside its index. Runs of one identity may share a folder."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_guidance.backend.shipped import find_file
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.integrity import canonical_json, check_types, file_sha256, read_checked, sha256

FORMAT = 3
_RUN = {"fingerprint": str, "identity": dict, "versions": dict, "created": str, "shard_size": int, "num_samples": int}
_MOST_SHARDS = 1_000_000
_UNSET = "(not set)"
# How much is done at a time, and by how many; up to rounding it changes nothing.
_NOT_PIXELS = {
    *("compile", "decode_batch", "num_samples", "batch_size", "shard_size", "num_workers", "max_corrupt", "class_names")
}
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


def check_size(num_samples: int, shard_size: int) -> None:
    """Raise ConfigurationError for a number of samples that cannot be cut into shards."""
    if num_samples < 1 or shard_size < 1:
        raise ConfigurationError(f"num_samples and shard_size must be at least 1, got {num_samples} and {shard_size}")
    if num_samples > _MOST_SHARDS * shard_size:
        raise ConfigurationError(
            f"{num_samples:,} samples in shards of {shard_size:,} are more than {_MOST_SHARDS:,} files: raise data.shard_size"
        )


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Content of a folder's run.json, see :meth:`~calib_guidance.runs.folder.RunFolder.begin`; None if there is none."""
    file = Path(folder) / "run.json"
    try:
        run = read_checked(file, {"format": int})
        if run["format"] != FORMAT:
            raise ValueError(f"format {run['format']}, this version of calib_guidance reads {FORMAT}")
        check_types(run, _RUN)
        check_size(run["num_samples"], run["shard_size"])
        if run["fingerprint"] != sha256(canonical_json(run["identity"])):
            raise ValueError("its fingerprint is not that of its identity")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigurationError(
            f"{file} is corrupted ({error}): restore it, or choose another folder (trainer.default_root_dir)"
        ) from error
    return run


def requested(run: Mapping[str, Any], option: str) -> Any:
    """An option of ``data`` that a run.json was sampled with, such as ``seed``; None where it does not say."""
    return run["identity"].get(f"data.init_args.{option}")


def differences(run: Mapping[str, Any], identity: Mapping[str, Any], shard_size: int) -> list[str]:
    """Where a run.json differs from an identity and a shard size, ``key: then, now`` each."""
    then = run["identity"] | {"shard_size": run["shard_size"]}
    now = json.loads(canonical_json(identity)) | {"shard_size": shard_size}
    return [
        f"{key}: {then.get(key, _UNSET)} in the folder, now {now.get(key, _UNSET)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, _UNSET) != now.get(key, _UNSET)
    ]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is neither a mapping nor a list of mappings."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, each in items:
        yield from leaves(each, f"{key}.{name}" if key else str(name))


@functools.cache
def _hash_of_version(path: Path, modified: int, size: int) -> str:
    return file_sha256(path)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, taken once as long as it is not changed."""
    status = os.stat(path)
    return _hash_of_version(Path(path), status.st_mtime_ns, status.st_size)


def settings(config: Mapping[str, Any], key: str, loaded: bool = False, trains: bool = False) -> dict[str, Any]:
    """Leaves of a part of the configuration, whose dotted keys start with ``key``; files by content, wherever they are.

    ``loaded`` leaves out files of weights: what was loaded from them is hashed. ``trains`` keeps how much is done at a time:
    training depends on it.
    """
    found: dict[str, Any] = {}
    for name, value in leaves(config, key):
        if name.rpartition(".")[2] in _NOT_PIXELS and not trains:
            continue
        # A file of the working directory that happens to be named like a setting does not count.
        is_path = isinstance(value, str) and ("/" in value or Path(value).suffix or name.endswith(".labels"))
        path = find_file(value) if is_path else None
        if loaded and path is not None and (path.suffix in _WEIGHTS or path.is_dir()) and path.exists():
            continue
        found[name] = value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
        if path is not None and path.is_file():
            found[name] = f"sha256 of the file {file_hash(path)}"
    return found


def settings_digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the options of a class."""
    return sha256(json.dumps(settings(config, "init_args"), sort_keys=True, default=str).encode())[:8]


def hash_state(module: Any) -> str:
    """SHA-256 of names, types, shapes and bytes of a module's state."""
    import torch  # only sampling hashes weights; looking at a folder needs no torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name.replace('_orig_mod.', '')} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def run_identity(
    config: Mapping[str, Any], networks: Mapping[str, Any], precision: str, uint8_rule: str
) -> dict[str, Any]:
    """Identity of a run: dotted keys of the configuration, and hashes of the loaded networks.

    In it: everything of ``model`` and ``data`` except how many samples there are and how many are made at a time, precision, and
    the rule of rounding to 8 bits. Not in it: devices, nodes, callbacks that only measure, and where files are.
    """
    identity = settings(config["model"], "model", loaded=True) | settings(config["data"], "data")
    identity |= {f"weights of {name}": hash_state(module) for name, module in networks.items()}
    return identity | {"trainer.precision": precision, "uint8_rule": uint8_rule}
