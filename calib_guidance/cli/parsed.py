"""A configuration that is parsed and validated, but not built."""

from __future__ import annotations

import contextlib
import copy
import logging
import pkgutil
import socket
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
from jsonargparse import Namespace

from calib_guidance.backend.counters import KnownShapes
from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning
from calib_guidance.errors import ConfigurationError
from calib_guidance.weights import registry

_WEIGHTS = {
    "checkpoint",
    "weights",
    "vae",
    "latent_stats",
    "statistics",
}  # options that take a file, a folder, or a name that a library knows
# Architectures with random weights in place of a missing autoencoder: Stable Diffusion's and TAESD's.
_RANDOM = {
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    },
    "source": {},
}

_SHAPES = KnownShapes()  # of networks that several configurations build


class ModulesMadeOnce:
    """Makes each module once for equal arguments, for models that are built for what their constructors refuse alone."""

    def __init__(self) -> None:
        self._made: dict[Hashable, torch.nn.Module] = {}
        self._arguments: dict[int, tuple[Any, ...]] = {}  # by id of what is made, which stays

    def __call__(self, kind: type[torch.nn.Module], *args: Any, **options: Any) -> torch.nn.Module:
        try:
            key = self._key((kind, args, options))
        except TypeError:
            return kind(*args, **options)
        if key not in self._made:
            made = self._made[key] = self._new(kind, args, options)
            self._arguments[id(made)] = kind, args, options
        return self._made[key]

    def _new(self, kind: type[torch.nn.Module], args: Any, options: Any) -> torch.nn.Module:
        return kind(*self._copy(args), **self._copy(options))

    def _copy(self, value: Any) -> Any:
        """An argument with modules of its own, which the module that it is given to may change."""
        if isinstance(value, dict):
            return {name: self._copy(each) for name, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._copy, value))
        return self._new(*self._arguments[id(value)]) if id(value) in self._arguments else value

    def _key(self, value: object) -> Hashable:
        """What an argument is told apart by; TypeError for an object that was not made here."""
        if isinstance(value, dict):
            return dict, *((name, self._key(each)) for name, each in value.items())
        if type(value) in (list, tuple):
            return type(value), *map(self._key, value)
        if value is None or isinstance(value, str | int | float | type):
            return type(value), value
        if id(value) not in self._arguments:
            raise TypeError(type(value))
        return self._key(self._arguments[id(value)])


class ParsedCLI(CalibGuidanceCLI):
    """The command line, parsed and validated. It builds parts on request and runs nothing."""

    @property
    def options(self) -> Namespace:
        """The configuration of the subcommand."""
        return self.config[self.subcommand]

    @property
    def trains(self) -> bool:
        """Whether the model is for ``fit``."""
        if self.options.get("model") is None:
            raise ConfigurationError("the configuration has no model: name a YAML file with --config")
        return pkgutil.resolve_name(self.options.model.class_path).training_step is not L.LightningModule.training_step

    def before_instantiate_classes(self) -> None:
        if not self.trains:
            super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        pass

    def _add_instantiators(self) -> None:
        """Skips the instantiators that keep the configuration for load_from_checkpoint; they validate it again per part."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def build(self, name: str, node: object, made: ModulesMadeOnce | None = None) -> Any:
        """The object of one part (``model``, ``data``, ``trainer`` …); ``node`` is not changed."""
        part = Namespace()
        part[name] = copy.deepcopy(node)
        instantiators = [(made, torch.nn.Module, True)] if made else None
        return self._parser(self.subcommand).instantiate(part, instantiators=instantiators)[name]

    def build_on_meta(self, made: ModulesMadeOnce | None = None) -> L.LightningModule | None:
        """The model on the meta device, without its weights; None if only their file says what the architecture is.

        With ``made``, of modules that other models may have, too.
        """
        model = copy.deepcopy(self.options.model)
        for option in [o for o in all_options(model, "model") if o.is_weights]:
            if not use_random_weights(option):
                return None
        with torch.device("meta"), _SHAPES:
            return self.build("model", model, made)


def read_configuration(argv: Sequence[str]) -> ParsedCLI:
    """The configuration under the command for its model: ``fit`` for a model that trains, else ``predict``."""
    cli = run_lightning(["predict", *argv], ParsedCLI)
    return run_lightning(["fit", *argv], ParsedCLI) if cli.trains else cli


class NoDownloadError(OSError):
    """A download was attempted where none is allowed."""


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Forbid downloads: the libraries of the hub use their caches only, and connections raise NoDownloadError."""
    import datasets
    import huggingface_hub

    def refuse(address: tuple[str, int], *args: object, **kwargs: object) -> socket.socket:
        raise NoDownloadError(f"it would be downloaded, from {address[0]}")

    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.object(socket, "create_connection", refuse),
    ):
        yield


@contextlib.contextmanager
def quietly(level: int = logging.INFO) -> Iterator[None]:
    """Without warnings and without messages up to a level: Lightning's about devices, seeds and loops."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


class Option(NamedTuple):
    """One option of a configuration; ``owner[key]`` is its value."""

    name: str
    owner: Namespace
    key: str

    @property
    def value(self) -> Any:
        return self.owner[self.key]

    @property
    def is_weights(self) -> bool:
        """Whether it names weights. (``source`` of a decoder does; that of images has ``image_size`` beside it.)"""
        if not isinstance(self.value, str):
            return False
        decoder = self.key == "source" and "image_size" not in self.owner
        return self.key in _WEIGHTS or decoder or self.value.startswith("hf://")


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


def published(value: str) -> registry.Card | None:
    """The published file that a path or hub id names."""
    repository = value.partition("@")[0]
    by_source = (e for e in registry.CARDS.values() if e.source.startswith("hf://") and repository.startswith(e.source))
    return registry.by_file(value) or next(by_source, None)


def use_random_weights(option: Option) -> bool:
    """Replace an option's weights by random ones of the same architecture; False where only the file knows which."""
    card, from_file = published(option.value), option.key == "checkpoint" and option.owner.get("network", "") is None
    if from_file:
        option.owner["network"] = card and card.name
    sizes = dict(card.arguments) if option.key == "vae" and card is not None else None
    option.owner[option.key] = copy.deepcopy(sizes or _RANDOM.get(option.key))
    return card is not None or not from_file
