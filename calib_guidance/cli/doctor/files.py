"""The files that a run reads, and where those that are missing come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from jsonargparse import Namespace

from calib_guidance.backend.shipped import find_file
from calib_guidance.cli.parsed import Option, all_options, published
from calib_guidance.data.base import SourceOptions
from calib_guidance.data.requests import POLICIES
from calib_guidance.data.source import source_kind
from calib_guidance.errors import ConfigurationError

_LATER = "is not in this machine's cache: it is downloaded at first use"


def amount(number: float, units: tuple[str, ...] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """Text of a number of bytes, or of other units in steps of 1,000."""
    power = next((p for p in range(len(units)) if number < 1000 ** (p + 1)), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"


def duration(low: float, high: float) -> str:
    """Text of a range of seconds."""
    units = (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2), ("s", 1, 1), ("ms", 1e-3, 0))
    unit, length, _ = next(unit for unit in units if high >= unit[1] * unit[2])
    texts = dict.fromkeys(f"{float(f'{seconds / length:.3g}'):,g}" for seconds in (low, high))
    return f"{' to '.join(texts)} {unit}"


def _hub_cache(repository: str) -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"))


def _library_weights(value: str, network: str) -> tuple[Path, str] | None:
    """Path in the cache and source of weights that torchvision or timm knows; None if neither does."""
    library, _, model = network.partition("/")
    if library == "torchvision":
        import torchvision

        with contextlib.suppress(ValueError, KeyError):  # it does not know the model or its weights
            known = torchvision.models.get_model_weights(model)[value]
            cached = Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name)
            return cached, f"{known.url} ({known.meta['_file_size']:.3g} MB)"
    if library == "timm" and value == "pretrained":
        import timm

        if timm.is_model(model):
            hub_id = timm.get_pretrained_cfg(model).hf_hub_id
            return _hub_cache(hub_id), f"https://huggingface.co/{hub_id}"
    return None


def _find_weights(value: str, network: object) -> tuple[str, ...]:
    """Mark and lines for weights: a file, a folder, a hub id (``hf://…``) or a name known to the network's library."""
    path = find_file(Path(value).expanduser())
    if path.exists():
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        return ("ok", f"{value} ({amount(size)})") if size else ("wrong", f"{value} is empty: download it again")
    about, cached, name = (), None, value
    if (card := published(value)) is not None:
        address = card.source.replace("hf://", "https://huggingface.co/")
        about = (f"public: {card.name}, {amount(card.bytes)}, license {card.license}", f"from {address}")
    if value.startswith("hf://"):
        cached = _hub_cache("/".join(value.removeprefix("hf://").partition("@")[0].split("/")[:2]))
    elif isinstance(network, str) and (found := _library_weights(value, network)) is not None:
        cached, about, name = found[0], (f"from {found[1]}",), f"{network}: {value}"
    if cached is not None:
        here = cached.is_file() or any(cached.glob("snapshots/*/*"))
        return ("ok", f"{value} ({cached})") if here else ("note", f"{name} {_LATER}", *about)
    if about:
        return ("missing", value, *about, f"save it as {path}")
    return ("missing", f"{value}: no such file, and no public source is known", "name an existing file, or create it")


def _find_images(source: str) -> tuple[str, ...]:
    """Mark and lines for a data set of images."""
    import datasets

    try:
        kind = source_kind(SourceOptions(source, of_data=True))
    except ConfigurationError as error:
        return "wrong", str(error)
    cached = Path(datasets.config.HF_DATASETS_CACHE, source.replace("/", "___").lower())
    if kind != "hub" or cached.is_dir():
        return "ok", f"{source} ({cached if kind == 'hub' else kind})"
    login = f"https://huggingface.co/datasets/{source} (if that asks for a login: hf auth login)"
    return "note", f"{source} {_LATER}, from", login, "its images are not checked; the batch below is random noise"


def _find(option: Option) -> tuple[str, ...] | None:
    """Mark and lines for the file that an option names; None where it names none."""
    value, absent = option.value, ()
    if not isinstance(value, str):
        return None
    if option.is_weights:
        return _find_weights(value, option.owner.get("network"))
    if option.key == "source":
        return _find_images(value)
    if option.key == "labels" and value not in POLICIES and not value.lstrip("-").isdigit():
        absent = ("no such file of labels",)
    elif option.key == "reference" and value.endswith(".npz"):
        absent = ("no such reference", "create it with calib-guidance reference; checkpoints/README.md lists ADM's")
    elif option.key == "ckpt_path" and value not in ("last", "best", "hpc", "registry"):
        absent = ("no such checkpoint to resume from",)
    if not absent or Path(value).is_file():
        return ("ok", value) if absent else None
    return "missing", f"{value}: {absent[0]}", *absent[1:]


def find_files(options: Namespace) -> Iterator[tuple[str, list[str], Option]]:
    """Mark, lines of text, and option of every file that a configuration reads, in the order of its options."""
    listed = [o for part in ("model", "data", "trainer") for o in all_options(options.get(part), f"--{part}")]
    for option in [*listed, *([Option("--ckpt_path", options, "ckpt_path")] if "ckpt_path" in options else [])]:
        if (found := _find(option)) is not None:
            mark, *lines = found
            yield mark, lines if mark == "ok" else [*lines, f"required by {option.name}"], option


def missing_files(options: Namespace) -> list[str]:
    """What a run would fail on: every file that is missing or empty, with its source and the option that names it."""
    return ["; ".join(lines) for mark, lines, _ in find_files(options) if mark in ("missing", "wrong")]
