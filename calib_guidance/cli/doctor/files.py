"""The files that a configuration reads: which are here, and where the others come from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import timm
import torch
import torchvision
from jsonargparse import Namespace

from calib_guidance.backend.shipped import find_file
from calib_guidance.cli.doctor.report import amount
from calib_guidance.cli.parsed import Option, all_options, published
from calib_guidance.data.base import SourceOptions, init_arg
from calib_guidance.data.sample_requests import POLICIES
from calib_guidance.data.source import source_kind
from calib_guidance.errors import ConfigurationError


class Finding(NamedTuple):
    """A file that the configuration reads.

    Attributes:
        mark: ``ok``; ``note`` for a file that is downloaded at first use; ``missing``; ``wrong``.
        text: lines for people: the file, its source, what to do.
        option: that names it; None for a command-line option.
    """

    mark: str
    text: tuple[str, ...]
    option: Option | None


def _library_weights(value: str, network: str) -> tuple[object, str] | None:
    """Path in the cache (None if absent) and source of weights that torchvision or timm knows; None if neither does."""
    library, _, model = network.partition("/")
    if library == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        if (known := torchvision.models.get_model_weights(model).__members__.get(value)) is None:
            return None
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name)
        return cached if cached.is_file() else None, f"{known.url} ({known.meta['_file_size']:.3g} MB)"
    if library == "timm" and timm.is_model(model) and value == "pretrained":
        hub_id = timm.get_pretrained_cfg(model).hf_hub_id
        cached = huggingface_hub.try_to_load_from_cache(hub_id, "model.safetensors")
        return cached if isinstance(cached, str) else None, f"https://huggingface.co/{hub_id}"
    return None


def _find_weights(value: str, network: object) -> tuple[str, ...]:
    """Mark and lines for weights: a file, a folder, a hub id (``hf://…``) or a name known to the network's library."""
    path = find_file(Path(value).expanduser())
    if path.exists():
        size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        return ("ok", f"{value} ({amount(size)})") if size else ("wrong", f"{value} is empty: download it again")
    about, later = (), "is not in this machine's cache: it is downloaded at first use"
    if (entry := published(value)) is not None:
        source = entry.source.replace("hf://", "https://huggingface.co/")
        about = (f"public: {entry.name}, {amount(entry.bytes)}, license {entry.license}", f"from {source}")
    if value.startswith("hf://"):
        repository = "--".join(value.removeprefix("hf://").partition("@")[0].split("/")[:2])
        cached = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository}")
        here = any(cached.glob("snapshots/*/*"))
        return ("ok", f"{value} ({cached})") if here else ("note", f"{value} {later}", *about)
    if isinstance(network, str) and (found := _library_weights(value, network)) is not None:
        cached, source = found
        return ("ok", f"{value} ({cached})") if cached else ("note", f"{network}: {value} {later}", f"from {source}")
    if about:
        return ("missing", value, *about, f"save it as {path}")
    return ("missing", f"{value}: no such file, and no public source is known", "name an existing file, or create it")


def _find_images(source: str) -> tuple[str, ...]:
    """Mark and lines for a data set of images.

    Raises:
        ConfigurationError: ``source`` names no data set.
    """
    kind = source_kind(SourceOptions(source, option=init_arg))
    cached = Path(datasets.config.HF_DATASETS_CACHE, source.replace("/", "___").lower())
    if kind != "hub" or cached.is_dir():
        return "ok", f"{source} ({cached if kind == 'hub' else kind})"
    return (
        "note",
        f"{source} is not in this machine's cache: it is downloaded at first use, from",
        f"https://huggingface.co/datasets/{source} (if that asks for a login: hf auth login)",
        "its images are not checked; the batch below is random noise",
    )


def _find(option: Option) -> tuple[str, ...] | None:
    """Mark and lines for the file that an option names; None where it names none."""
    value = option.value
    if not isinstance(value, str):
        return None
    if option.is_weights:
        return _find_weights(value, option.owner.get("network"))
    if option.key == "source":
        try:
            return _find_images(value)
        except ConfigurationError as error:
            return "wrong", str(error)
    text = {
        "labels": ("no such file of labels",),
        "reference": (
            "no such reference",
            "create it with calib-guidance reference; checkpoints/README.md lists ADM's",
        ),
    }.get(option.key)
    file = (
        value.endswith(".npz")
        if option.key == "reference"
        else value not in POLICIES and not value.lstrip("-").isdigit()
    )
    if text is None or not file:
        return None
    return ("ok", value) if Path(value).is_file() else ("missing", f"{value}: {text[0]}", *text[1:])


def check_files(options: Namespace) -> list[Finding]:
    """Every file that a configuration reads, in the order of its options."""
    found = []
    for part in ("model", "data", "trainer"):
        for option in all_options(options.get(part), f"--{part}"):
            if (lines := _find(option)) is not None:
                asked = () if lines[0] == "ok" else (f"required by {option.name}",)
                found.append(Finding(lines[0], (*lines[1:], *asked), option))
    checkpoint = options.get("ckpt_path")
    if checkpoint not in (None, "last", "best", "hpc", "registry") and not Path(checkpoint).is_file():
        text = (f"{checkpoint}: no such checkpoint to resume from", "required by --ckpt_path")
        found.append(Finding("missing", text, None))
    return found


def missing_files(options: Namespace) -> list[str]:
    """What a run would fail on: every file that is missing or empty, with its source and the option that names it."""
    return ["; ".join(finding.text) for finding in check_files(options) if finding.mark in ("missing", "wrong")]
