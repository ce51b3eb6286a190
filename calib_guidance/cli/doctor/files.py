"""The configuration as it is read, and the files that it names."""

from __future__ import annotations

import contextlib
import copy
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import lightning as L
import timm
import torch
import torchvision
from jsonargparse import Namespace

from calib_guidance.backend.shipped import find_file
from calib_guidance.cli.doctor.report import Report, amount
from calib_guidance.cli.lightning import CalibGuidanceCLI, import_class, run_lightning
from calib_guidance.data.base import init_arg
from calib_guidance.data.sample_requests import POLICIES
from calib_guidance.data.source import source_kind
from calib_guidance.errors import ConfigurationError
from calib_guidance.weights import registry

_WEIGHTS = {"checkpoint", "weights", "vae"}  # options of files or folders of weights, or of names that a library knows
# What is looked at in place of an autoencoder that is not here: Stable Diffusion's, and TAESD's, with random weights.
_STAND_INS = {
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    },
    "source": {},
}


class Unbuilt(CalibGuidanceCLI):
    """The command line, read and checked: nothing is built and nothing is run."""

    @property
    def options(self) -> Namespace:
        return self.config[self.subcommand]

    @property
    def trains(self) -> bool:
        if self.options.get("model") is None:
            raise ConfigurationError("the configuration has no model: name a YAML file with --config")
        return import_class(self.options.model.class_path).training_step is not L.LightningModule.training_step

    def before_instantiate_classes(self) -> None:
        if not self.trains:
            super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        pass

    def _add_instantiators(self) -> None:
        """Leaves out what keeps the configuration for load_from_checkpoint, and checks all of it again for every part."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def parse(self, content: dict[str, Any]) -> Namespace:
        """A whole configuration, checked as the files are."""
        return self._parser(self.subcommand).parse_object(content)

    def build(self, name: str, node: object) -> Any:
        """One part of the configuration as an object; ``node`` is kept as it is."""
        part = Namespace()
        part[name] = copy.deepcopy(node)
        return self._parser(self.subcommand).instantiate(part)[name]


def read_configuration(words: Sequence[str]) -> Unbuilt:
    """The configuration under the command that its model is for: ``fit`` for what trains, else ``predict``."""
    cli = run_lightning(["predict", *words], Unbuilt)
    return run_lightning(["fit", *words], Unbuilt) if cli.trains else cli


class Option(NamedTuple):
    """One option of a configuration; ``owner[key]`` is its value."""

    name: str
    owner: Namespace
    key: str

    @property
    def value(self) -> Any:
        return self.owner[self.key]


def all_options(node: object, name: str) -> Iterator[Option]:
    """Every option below a node that is neither a mapping nor a list of them."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from all_options(item, f"{name}[{number}]")
    elif isinstance(node, Namespace):
        for key, value in vars(node).items():
            if isinstance(value, Namespace | list):
                yield from all_options(value, f"{name}.{key}")
            else:
                yield Option(f"{name}.{key}", node, key)


class NoDownloadError(OSError):
    """Something wanted to use the network."""


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Nothing is downloaded in here: the hub's libraries look into their caches alone, and connections are refused."""

    def refuse(address: tuple[str, int], *args: object, **kwargs: object) -> socket.socket:
        raise NoDownloadError(f"it would be downloaded, from {address[0]}")

    changes = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_HUB_OFFLINE", True),
        (socket, "create_connection", refuse),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _library_weights(value: str, network: str) -> tuple[Path | None, str] | None:
    """Path in the cache (or None) and source of weights that torchvision or timm has by name; None where it has not."""
    library, _, model = network.partition("/")
    if library == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        known = torchvision.models.get_model_weights(model).__members__
        if value in known:
            cached = Path(torch.hub.get_dir(), "checkpoints", Path(known[value].url).name)
            return (
                cached if cached.is_file() else None,
                f"{known[value].url} ({known[value].meta['_file_size']:.3g} MB)",
            )
    if library == "timm" and timm.is_model(model) and value == "pretrained":
        hub_id = timm.get_pretrained_cfg(model).hf_hub_id
        cached = huggingface_hub.try_to_load_from_cache(hub_id, "model.safetensors")
        return Path(cached) if isinstance(cached, str) else None, f"https://huggingface.co/{hub_id}"
    return None


def _published(value: str) -> registry.Card | None:
    """The published file that a path or hub id names."""
    repository = value.partition("@")[0]
    by_source = (e for e in registry.CARDS.values() if e.source.startswith("hf://") and repository.startswith(e.source))
    return registry.by_file(value) or next(by_source, None)


def _about(value: str) -> list[str]:
    """What is known of a published file, for the eye."""
    entry = _published(value)
    if entry is None:
        return []
    source = entry.source.replace("hf://", "https://huggingface.co/")
    return [f"public: {entry.name}, {amount(entry.bytes)}, license {entry.license}", f"from {source}"]


def locate_weights(value: str, network: object) -> tuple[str, list[str]]:
    """Where weights are: ``ok``, ``note`` where they are downloaded at first use, ``missing`` or ``wrong``; and why.

    Args:
        value: file, folder, hub id (``hf://…``) or name that the network's library knows.
        network: the option ``network`` beside it.
    """
    path = find_file(Path(value).expanduser())
    if path.exists():
        size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        return ("ok", [f"{value} ({amount(size)})"]) if size else ("wrong", [f"{value} is empty: download it anew"])
    later = f"{value} is not in this machine's cache: downloaded at first use"
    if value.startswith("hf://"):
        repository = "--".join(value.removeprefix("hf://").partition("@")[0].split("/")[:2])
        cached = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository}")
        return (
            ("ok", [f"{value} ({cached})"]) if any(cached.glob("snapshots/*/*")) else ("note", [later, *_about(value)])
        )
    if isinstance(network, str) and (found := _library_weights(value, network)) is not None:
        cached, source = found
        return (
            ("note", [f"{network}: {later}", f"from {source}"]) if cached is None else ("ok", [f"{value} ({cached})"])
        )
    if about := _about(value):
        return "missing", [value, *about, f"and put it at {path}"]
    return "missing", [f"{value}: no such file, and no public source is known", "name an existing file, or make it"]


@dataclass
class Found:
    """What the search for files came to.

    Attributes:
        weights: options whose weights are here.
        untrained: whether some were left out, so that values mean nothing.
        undescribed: whether one of these would have told the architecture of its network.
        has_images: whether images to train on or to denoise are here.
    """

    weights: list[Option] = field(default_factory=list)
    untrained: bool = False
    undescribed: bool = False
    has_images: bool = True

    def leave_out(self, option: Option) -> None:
        """Goes on without what an option names."""
        self.undescribed |= _describes_network(option) and _published(option.value) is None
        leave_out(option)
        self.untrained = True


def is_weights(option: Option) -> bool:
    """Whether an option names weights. (``source`` of a decoder does, that of images has their size beside it.)"""
    if not isinstance(option.value, str):
        return False
    decoder = option.key == "source" and "image_size" not in option.owner
    return option.key in _WEIGHTS or decoder or option.value.startswith("hf://")


def _describes_network(option: Option) -> bool:
    """Whether the weights are to tell the architecture."""
    return option.key == "checkpoint" and "network" in option.owner and option.owner["network"] is None


def leave_out(option: Option) -> None:
    """Puts random weights in the place of an option's, of the published architecture where the file was to tell it."""
    entry = _published(option.value)
    if _describes_network(option) and entry is not None:
        option.owner["network"] = entry.name
    option.owner[option.key] = copy.deepcopy(_STAND_INS.get(option.key))


def check_files(cli: Unbuilt, report: Report) -> Found:
    """Look for every file that the configuration reads. What is not there is reported, and taken out of the configuration."""
    found = Found()
    for part in ("model", "data", "trainer"):
        for option in list(all_options(cli.options.get(part), f"--{part}")):
            if not isinstance(option.value, str):
                continue
            if is_weights(option):
                mark, text = locate_weights(option.value, option.owner.get("network"))
                report.add(mark, *text, *([] if mark == "ok" else [f"asked for by {option.name}"]))
                if mark == "ok":
                    found.weights.append(option)
                else:
                    found.leave_out(option)
            elif option.key == "source":
                with report.attempt(option.name):
                    found.has_images = False
                    found.has_images = _check_source(option.value, report)
            elif option.key == "labels" and option.value not in POLICIES and not option.value.lstrip("-").isdigit():
                if Path(option.value).is_file():
                    report.add("ok", option.value)
                else:
                    report.add("missing", f"{option.value}: no such file of labels", f"asked for by {option.name}")
                    option.owner[option.key] = POLICIES[0]
            elif option.key == "reference" and option.value.endswith(".npz"):
                if Path(option.value).is_file():
                    report.add("ok", option.value)
                else:
                    cure = "make it with calib-guidance reference; ADM's are named in checkpoints/README.md"
                    report.add("missing", f"{option.value}: no such reference", cure, f"asked for by {option.name}")
    checkpoint = cli.options.get("ckpt_path")
    if checkpoint not in (None, "last", "best", "hpc", "registry") and not Path(checkpoint).is_file():
        report.add("missing", f"{checkpoint}: no such checkpoint to go on from", "asked for by --ckpt_path")
    if not report.counts:
        report.add("ok", "the configuration reads none")
    return found


def _check_source(source: str, report: Report) -> bool:
    """Whether a data set of images is on this machine."""
    kind = source_kind(source, init_arg)
    cached = Path(datasets.config.HF_DATASETS_CACHE, source.replace("/", "___").lower())
    if kind != "hub" or cached.is_dir():
        report.add("ok", f"{source} ({cached if kind == 'hub' else kind})")
        return True
    report.add(
        "note",
        f"{source} is not in this machine's cache: downloaded at first use, from",
        f"https://huggingface.co/datasets/{source} (where that asks for a login: hf auth login)",
        "its images are not looked at here; the step below is run on made-up ones",
    )
    return False
