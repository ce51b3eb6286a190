"""The one LightningCLI: ``fit``, ``validate``, ``test`` and ``predict``."""

# ruff: noqa: E402 (some imports are deferred first)

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import re
import sys
import unittest.mock
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from calib_guidance.backend.light_imports import defer_imports, hold

defer_imports()

import jsonargparse
import lightning as L
import torch
from jsonargparse import set_config_read_mode
from jsonargparse.typing import PositiveInt, register_type
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from calib_guidance.backend.atomic import atomic_path, end_with_parent
from calib_guidance.backend.distributed import set_threads
from calib_guidance.backend.precision import fast_dtype
from calib_guidance.backend.text import read_yaml
from calib_guidance.callbacks import ExactResume, RunReport, SampleWriter, SamplingProgress
from calib_guidance.callbacks.clean_stop import restored_signals
from calib_guidance.callbacks.exact_resume import AtomicCheckpointIO, continue_logs
from calib_guidance.callbacks.reports import log_configuration
from calib_guidance.cli.configs import expand_bases, list_foreign
from calib_guidance.cli.docstrings import plain_docstrings
from calib_guidance.cli.optimizers import own_optimizer_defaults
from calib_guidance.cli.parse_once import options_found_once, parts_parsed_once, plain_names_found_directly
from calib_guidance.errors import ConfigurationError, FailedSamplesError, closest
from calib_guidance.runs.identity import leaves
from calib_guidance.tasks.retry import FaultTolerant
from calib_guidance.weights.io import CheckpointError, WeightsFile

# Imported so that configurations can name their classes without a module: `sampler: DDIM`.
_FOLDERS = ("callbacks", "classifiers", "data", "denoisers", "diffusion", "evaluation")
_FOLDERS += ("guidance", "networks", "samplers", "scores", "tasks", "training")
_PARTS = [importlib.import_module(f"calib_guidance.{folder}") for folder in _FOLDERS]
_PRECISIONS = (None, "32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16)


_PARSERS: dict[tuple[object, ...], dict[str, Any]] = {}


class SaveResolvedConfig(SaveConfigCallback):
    """Saves the resolved configuration; for ``predict``, beside the samples and only once sampling starts."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            super().setup(trainer, pl_module, stage)
        log_configuration(trainer, self.config.as_dict())

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            with atomic_path(Path(trainer.default_root_dir, self.config_filename)) as path:
                self.parser.save(self.config, path, skip_none=False, multifile=False, skip_validation=True)


def innermost(error: BaseException) -> BaseException:
    """What a constructor raised, which jsonargparse wraps in pages of unions and types; this package's own error if it is one."""
    while not isinstance(error, ConfigurationError | CheckpointError) and (
        deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    ):
        error = deeper
    return error


def _known_classes() -> dict[str, str]:
    """Paths of the classes that configurations name without a module, by name."""
    return {n: f"{part.__name__}.{n}" for part in _PARTS for n, kind in vars(part).items() if isinstance(kind, type)}


def _unknown_class(class_path: str) -> str:
    """What is wrong with a class path or class name that names nothing."""
    (module, _, name), known = class_path.rpartition("."), _known_classes()
    if name in ("yaml", "yml") or "/" in class_path:
        return f"there is no file {class_path}"
    if not module and name in known:
        return f"{known[name]} cannot be used here"
    try:
        return f"there is no {class_path}{closest(name, vars(importlib.import_module(module)) if module else known)}"
    except ImportError as error:
        return f"there is no {class_path} ({error})"


def _wrong_file(path: str) -> str:
    """What is wrong with a file that describes a part by class_path and init_args."""
    content = read_yaml(path)
    class_path = content.get("class_path") if isinstance(content, dict) else None
    if not isinstance(class_path, str):
        return f"{path} has no class_path"
    try:
        kind = pkgutil.resolve_name(_known_classes().get(class_path, class_path))
    except (ImportError, AttributeError, ValueError):
        return f"{path}: {_unknown_class(class_path)}"
    if unknown := _unknown_option(kind, content.get("init_args") or {}):
        return f"{path}: {unknown}"
    return f"{path} describes {kind.__name__}, which cannot be used here, or a value of its init_args is wrong"


def _unknown_option(kind: type, options: Iterable[str]) -> str | None:
    """What is wrong with the first option that a class does not have; None where it has all."""
    accepted = jsonargparse.ArgumentParser().add_class_arguments(kind, fail_untyped=False)
    for option in options:
        if option not in accepted:
            return f"{kind.__name__} has no option {option!r}{closest(option, accepted)}; it has: {', '.join(accepted)}"
    return None


def shorten(message: str) -> str:
    """What a parse error is about, without the pages of union types around it."""
    where = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    classes = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    values = re.findall(r"Expected an? <class '\w+'>\. Got value: .*|Import path \S+ does not correspond .*", message)
    if choices := re.search(r"Expected a typing\.Literal\[(.*?)\]", message):
        got = re.search(r"(?:Got|Given) value: (.*)", message[choices.start() :])
        found = f"unknown {got[1]!r}; known: {choices[1].replace(chr(39), '')}"
    elif shared := re.search(r"Multiple subclasses with name (\w+)\..*avoid ambiguity: (.*)\.", message):
        found = f"several classes are named {shared[1]}: give one of {shared[2]}"
    elif names := re.findall(r"Expected a dot import path string: (\S+)|Unexpected import path format: (\S+)", message):
        found = _unknown_class("".join(names[-1]))
    elif files := re.findall(r"Config file loop detected: (\S+) ->", message):
        found = _wrong_file(files[-1])
    elif classes and re.search(r"module '[\w.]+' has no attribute '\w+'|No module named '[\w.]+'", message):
        found = _unknown_class(classes[-1])
    elif "Option 'class_path' is not accepted" in message:
        found = f"within one file, its options stand in its mapping, and have no keys with dots ({where}.…) beside it"
    elif classes and (option := re.search(r"Option '([\w.]+)' is not accepted", message)):
        found = _unknown_option(pkgutil.resolve_name(classes[-1]), [option[1]])
    elif "Expected an instantiatable class, but" in message or "a dict without class_path but with" in message:
        found = (
            "options are given, but no class_path names the class. An overlay that only sets options goes after one "
            f"that names the class, such as guidance/ after classifier/. Within one file, options stand in the mapping, and "
            f"have no keys with dots ({where}.…) beside it"
        )
    elif len(values) == 1:
        found = values[0]
    else:
        return message
    return f"{where}: {found}"


@contextlib.contextmanager
def subclasses_listed_once() -> Iterator[None]:
    """While a configuration is read, remembers the subclasses of each type, this package's first where names are ambiguous.

    jsonargparse lists all subclasses of nn.Module, over a thousand with the libraries that are loaded here, each time that it
    tries whether a name such as ``adm_classifier128`` is a class: 11 of the 13 seconds that reading took. The list is made
    again when modules were imported since.
    """
    original = jsonargparse._typehints.get_all_subclass_paths

    @functools.cache
    def listed(num_modules: int, *args: object, **kwargs: object) -> list[str]:
        with hold():  # a class's shortest path is looked for in the packages around it
            paths = original(*args, **kwargs)
        ours = {path: path.rpartition(".")[2] for path in paths if path.startswith("calib_guidance.")}
        return [path for path in paths if path in ours or path.rpartition(".")[2] not in ours.values()]

    def patched(*args: object, **kwargs: object) -> list[str]:
        return listed(len(sys.modules), *args, **kwargs)

    with unittest.mock.patch("jsonargparse._typehints.get_all_subclass_paths", patched):
        yield


class CalibGuidanceCLI(LightningCLI):
    """LightningCLI with what sampling needs set: any module and data class, gradients inside predict."""

    def __init__(self, *args: object, own_process: bool = False, **kwargs: object):
        self._asked, self._own_process = next(iter(kwargs["args"]), None), own_process
        if own_process and self._asked == "predict":
            torch.set_num_threads(1)  # until it is known how many processes sample: a fork ends what threads there are
        each = {name: {"exit_on_error": False} for name in self.subcommands()}
        # Errors as exceptions, not as pages of usage.
        super().__init__(*args, parser_kwargs={"exit_on_error": False, **each}, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:
        """The subcommand of this call alone: a parser takes as long to make as Lightning to import."""
        known = LightningCLI.subcommands()
        return {self._asked: known[self._asked]} if self._asked in known else known

    def setup_parser(self, *args: object, **kwargs: object) -> None:
        """The parser of this command, kept for the next configuration: it takes as long to make as one to read."""
        made = _PARSERS.setdefault((type(self), *self.subcommands()), {})
        if not made:
            super().setup_parser(*args, **kwargs)
            made |= {
                name: vars(self)[name] for name in ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            }
        vars(self).update(made)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self._asked == "predict":
            help = (
                "processes that sample on the CPU, which changes no sample: a number, or auto for one per physical core as far "
                "as memory allows (1 if OMP_NUM_THREADS is set, under a launcher, and for main([...]) in Python)"
            )
            parser.add_argument("--workers", type=Literal["auto"] | PositiveInt, default="auto", help=help)

    @property
    def _num_processes(self) -> int | None:
        """Processes that sample; None leaves the number to the run."""
        asked = self.config[self.subcommand].get("workers", 1)
        return asked if asked != "auto" else None if self._own_process else 1

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        try:
            with parts_parsed_once(), own_optimizer_defaults(), options_found_once():
                super().parse_arguments(parser, args)
        except ArgumentError as error:
            if "Expected a dot import path string" in str(error) and "torchvision" not in sys.modules:
                importlib.import_module("torchvision.transforms.v2")  # whose classes may be named without a module
                importlib.import_module("timm")
                return self.parse_arguments(parser, args)
            raise ConfigurationError(shorten(str(error))) from error
        if not (command := self.config.get("subcommand")):
            return
        if (trainer := self.config[command].trainer).callbacks and not isinstance(trainer.callbacks, list):
            trainer.callbacks = [trainer.callbacks]  # Lightning takes one, too
        if not MPSAccelerator.is_available():
            return
        # Metrics, noise levels and temperatures need float64, which Apple's GPUs lack.
        if trainer.accelerator == "auto":
            trainer.accelerator = "cpu"
            rank_zero.rank_zero_info("the CPU is used: Apple's GPUs (MPS) have no float64, which is needed here")
        elif trainer.accelerator in ("mps", "gpu"):
            name = trainer.accelerator
            raise ConfigurationError(f"trainer.accelerator: {name} is MPS here, which has no float64: set it to cpu")

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail late: above all a run whose samples would not be written, or written twice."""
        config = self.config[self.subcommand]
        trainer, root = config.trainer, config.trainer.default_root_dir
        if isinstance(root, str) and (not root.strip() or "://" in root):
            raise ConfigurationError(f"trainer.default_root_dir must be a folder of this machine, got {root!r}")
        if self.subcommand != "predict":
            return
        if config.ckpt_path is not None:
            raise ConfigurationError(
                "predict takes no --ckpt_path: Lightning would put the training module of that checkpoint in place of the "
                "sampling one. Name the weights in the YAML: the denoiser's `checkpoint` or the classifier's `weights`"
            )
        config.return_predictions = False  # the writer has them; in memory they would grow with the run
        samples = config.get("model") and issubclass(pkgutil.resolve_name(config.model.class_path), FaultTolerant)
        if not samples or trainer.fast_dev_run:
            return
        classes = [pkgutil.resolve_name(callback.class_path) for callback in trainer.callbacks or []]
        writers = sum(isinstance(kind, type) and issubclass(kind, SampleWriter) for kind in classes)
        problem = None
        if writers > 1:
            problem = "trainer.callbacks has several SampleWriters, and a run has one: remove the others"
        elif not writers:
            problem = (
                "trainer.callbacks has no SampleWriter, and samples that nothing writes are lost: add SampleWriter. An overlay "
                "with `callbacks:` replaces the callbacks of the files before it; with `callbacks+:` it adds to them"
            )
        elif trainer.precision not in _PRECISIONS:
            problem = (
                f"trainer.precision of predict is 32-true, bf16-mixed or 16-mixed, got {trainer.precision}: for a network in "
                "half precision set its dtype"
            )
        elif root is None:
            problem = "trainer.default_root_dir is not set: set it to the folder for the samples"
        if problem:
            raise ConfigurationError(problem)

    def _dump_config(self) -> None:
        """Keeps the configuration for ``save_hyperparameters``, which no class here calls: dumping takes half of a parse."""
        parts = (self.config[self.subcommand].get(name) for name in ("model", "data"))
        if all(part is None or part.class_path.startswith("calib_guidance.") for part in parts):
            self.config_dump = {}
        else:
            super()._dump_config()

    def _parse_ckpt_path(self) -> None:
        """Keeps Lightning from merging a checkpoint's hyper-parameters over the configuration: the YAML says what is run."""

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        """The trainer, with what makes a run resumable: atomic checkpoints in a place that does not change."""
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        named = self._get(self.config_init, "trainer").callbacks or []
        own_bar = any(isinstance(callback, ProgressBar) for callback in named)  # the trainer adds its own to the list
        trainer = super().instantiate_trainer(**kwargs)
        # Lightning takes rich's bar where rich is installed, by gradio for example; it has no room for images per second.
        if not own_bar:
            trainer.callbacks = [TQDMProgressBar() if type(c) is RichProgressBar else c for c in trainer.callbacks]
        if trainer.fast_dev_run:  # writes nothing
            writing = (ModelCheckpoint, SampleWriter, RunReport)
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, writing)]
        if self._num_processes == 1 or not any(isinstance(callback, SampleWriter) for callback in trainer.callbacks):
            threads = set_threads(trainer.num_devices)
            rank_zero.rank_zero_info(f"{threads.count} CPU threads for each process ({threads.reason})")
        for callback in trainer.checkpoint_callbacks:
            # Lightning's default is in the logger's folder, a new one for every run, where `--ckpt_path last` finds nothing.
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir, "checkpoints"))
        samples = isinstance(getattr(self, "model", None), FaultTolerant)
        if self.subcommand == "predict" and samples and trainer.progress_bar_callback and not own_bar:
            others = [callback for callback in trainer.callbacks if not isinstance(callback, ProgressBar)]
            trainer.callbacks = [*others, SamplingProgress()]
        if self.subcommand == "fit":
            trainer.callbacks.append(ExactResume())  # after ModelCheckpoint, which Lightning puts last
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        """Lets ``--ckpt_path last`` also find what was written when SLURM took the nodes away, where that is newer."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == "last":
            folders = {getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks} - {None}
            last = [path for folder in folders for path in Path(folder).glob("last*.ckpt")]
            preempted = list(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
            newest = max([*last, *preempted], key=lambda path: path.stat().st_mtime, default=None)
            kwargs["ckpt_path"] = "last" if newest is None else str(newest)
        path = kwargs.get("ckpt_path")
        if path == "best":
            raise ConfigurationError("--ckpt_path: only the training process knows which is best: name a file, or last")
        if path not in (None, "last", "hpc") and ":" not in str(path) and not Path(path).exists():
            raise ConfigurationError(f"--ckpt_path: there is no file {path}; expected a checkpoint, or last")
        if subcommand == "fit" and path not in (None, "last", "hpc"):
            continue_logs(self.trainer.loggers, Path(path))
        return kwargs

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"seed_everything: {error}") from error

    def after_predict(self) -> None:
        """Raise for failed samples, so that the exit status tells of them. ``max_corrupt`` bounds unreadable images."""
        if not (isinstance(self.model, FaultTolerant) and self.trainer.is_global_zero):
            return
        if failed := [str(sample["index"]) for sample in self.model.context.failed()]:
            listed = ", ".join(failed[:10]) + (" …" if len(failed) > 10 else "")
            where = f"calib-guidance status {self.model.context.store.path} lists the reasons"
            raise FailedSamplesError(f"{len(failed)} samples failed: {listed} ({where})")

    def instantiate_classes(self) -> None:
        """Build all parts, and give the resolved configuration to those that store it, which have ``configure_run``."""
        try:
            super().instantiate_classes()
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            message = str(innermost(error))
            if "tensorboardX" in message:  # Lightning's, which does not know our extras
                message = "TensorBoardLogger needs tensorboard: pip install 'calib-guidance[tensorboard]'"
            raise ConfigurationError(message) from error
        configuration = self.config.get(str(self.subcommand), self.config).as_dict()
        if isinstance(self.model, FaultTolerant):
            self.model.context.num_processes = self._num_processes
        chosen = {f"{key}: auto" for key, value in leaves(configuration.get("model"), "model") if value == "auto"}
        if chosen := sorted(key for key in chosen if key.endswith("dtype: auto")):
            rank_zero.rank_zero_info(f"{', '.join(chosen)}: {', as '.join(fast_dtype())}")
        for part in (self.model, *self.trainer.callbacks):
            if hasattr(part, "configure_run"):
                part.configure_run(configuration)


@restored_signals()
def run_lightning(
    argv: Sequence[str], cli: type[CalibGuidanceCLI] = CalibGuidanceCLI, own_process: bool = False
) -> CalibGuidanceCLI:
    """Run one Lightning subcommand with its options; in a process that does nothing else, ``predict`` may fork others."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        end_with_parent()  # started by the process of rank 0, which may be killed
    for message in (
        ".*LightningCLI's args parameter is intended.*",  # main(args) is for that
        ".*does not have many workers.*",  # requests and in-memory digits need none
        ".*`IterableDataset` has `__len__` defined.*",  # and with none, that length is exact
        ".*Total length of `ShardLoader` across ranks is zero.*",  # nothing left to sample
        ".*LeafSpec.*is deprecated.*",  # Lightning's own
        ".*set_vital.*is deprecated.*",  # torchdata's own
    ):
        warnings.filterwarnings("ignore", message=message)
    # Advertisements of cloud services among the log lines of a run.
    logging.getLogger(rank_zero.__name__).addFilter(lambda record: "Tip: For seamless cloud" not in record.getMessage())
    # Lightning has options of classes read as configuration files where they are addresses: hf://… would ask the hub.
    set_config_read_mode(fsspec_enabled=False)
    args, started = expand_bases(argv), Path.cwd()

    def weights_file(value: object) -> WeightsFile:
        """Relative to the YAML that names it where it lies there: jsonargparse reads a YAML in its folder."""
        if not isinstance(value, str):
            raise TypeError(f"not a path: {value!r}")
        return WeightsFile(value) if Path.cwd() == started else WeightsFile.beside(value, Path.cwd())

    register_type(WeightsFile, str, weights_file)
    list_foreign(args)
    try:
        with plain_docstrings(), subclasses_listed_once(), plain_names_found_directly():
            done = cli(
                save_config_callback=SaveResolvedConfig,
                save_config_kwargs={"overwrite": True},
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                # Predict runs under inference mode unless told not to, and guidance takes gradients inside it.
                trainer_defaults={"inference_mode": False},
                args=args,
                own_process=own_process,
            )
            done.parser._instantiators = None  # which hold the model
            return done
    except MisconfigurationException as error:
        raise ConfigurationError(
            f"trainer: {error} Expected accelerator: auto, cpu or gpu; devices: auto, a number from 1, or a list of devices"
        ) from error
