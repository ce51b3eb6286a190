"""The files that a run reads, where those that are missing come from, and whether its own can be written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import lightning as L
import torch
from jsonargparse import Namespace

from calib_guidance.backend.shipped import find_file
from calib_guidance.callbacks import SampleWriter
from calib_guidance.cli.doctor.report import Report, amount
from calib_guidance.cli.parsed import Option, all_options, published
from calib_guidance.data.base import SourceOptions
from calib_guidance.data.requests import POLICIES
from calib_guidance.data.source import source_kind
from calib_guidance.errors import ConfigurationError

_LATER = "is not in this machine's cache: it is downloaded at first use"


class Finding(NamedTuple):
    """A file that an option names: a mark and lines of text for :class:`~calib_guidance.cli.doctor.report.Report`."""

    mark: str
    text: tuple[str, ...]
    option: Option


def _hub_cache(repository: str) -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"))


def _library_weights(value: str, network: str) -> tuple[Path, str] | None:
    """Path in the cache and source of weights that torchvision or timm knows; None if neither does."""
    library, _, model = network.partition("/")
    with contextlib.suppress(ValueError, KeyError):  # torchvision does not know the model or its weights
        if library == "torchvision":
            import torchvision

            known = torchvision.models.get_model_weights(model)[value]
            cached = Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name)
            return cached, f"{known.url} ({known.meta['_file_size']:.3g} MB)"
    if library == "timm" and value == "pretrained":
        import timm

        if not timm.is_model(model):
            return None
        hub_id = timm.get_pretrained_cfg(model).hf_hub_id
        return _hub_cache(hub_id), f"https://huggingface.co/{hub_id}"
    return None


def _find_weights(value: str, network: object) -> tuple[str, ...]:
    """Mark and lines for weights: a file, a folder, a hub id (``hf://…``) or a name known to the network's library."""
    path = find_file(Path(value).expanduser())
    if path.exists():
        size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
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
    return (
        "note",
        f"{source} {_LATER}, from",
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
        return _find_images(value)
    if option.key == "labels" and value not in POLICIES and not value.lstrip("-").isdigit():
        absent = ("no such file of labels",)
    elif option.key == "reference" and value.endswith(".npz"):
        absent = ("no such reference", "create it with calib-guidance reference; checkpoints/README.md lists ADM's")
    elif option.key == "ckpt_path" and value not in ("last", "best", "hpc", "registry"):
        absent = ("no such checkpoint to resume from",)
    else:
        return None
    return ("ok", value) if Path(value).is_file() else ("missing", f"{value}: {absent[0]}", *absent[1:])


def check_files(options: Namespace) -> list[Finding]:
    """Every file that a configuration reads, in the order of its options."""
    listed = [o for part in ("model", "data", "trainer") for o in all_options(options.get(part), f"--{part}")]
    if "ckpt_path" in options:
        listed.append(Option("--ckpt_path", options, "ckpt_path"))
    found = []
    for option in listed:
        if (lines := _find(option)) is not None:
            asked = () if lines[0] == "ok" else (f"required by {option.name}",)
            found.append(Finding(lines[0], (*lines[1:], *asked), option))
    return found


def missing_files(options: Namespace) -> list[str]:
    """What a run would fail on: every file that is missing or empty, with its source and the option that names it."""
    return ["; ".join(finding.text) for finding in check_files(options) if finding.mark in ("missing", "wrong")]


def check_output(report: Report, trainer: L.Trainer, callbacks: Iterable[L.Callback], size: float) -> None:
    """Report whether ``size`` bytes can be written into the folder of the run; nothing is written."""
    folder = Path(trainer.default_root_dir)
    for writer in (callback for callback in callbacks if isinstance(callback, SampleWriter)):
        with report.attempt("the run in the output folder"):
            if writer.earlier_run(trainer):
                fate = "will be removed" if writer.restart else "is resumed if both make the same samples"
                report.add("note", f"{folder} holds a run, which {fate}")
    nearest = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        report.add("wrong", f"{folder} is not writable: set trainer.default_root_dir to a folder that is")
        return
    free = shutil.disk_usage(nearest).free
    mark, *cure = ("ok",) if size <= free else ("wrong", "set trainer.default_root_dir to a disk with more space")
    report.add(mark, f"output: up to {amount(size)} in {folder}, {amount(free)} of disk space are free", *cure)
