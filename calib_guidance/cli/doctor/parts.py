"""The parts of a run, built as the command would build them, and checked against each other."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from calib_guidance.callbacks import ExportClassifier, SampleWriter
from calib_guidance.cli.doctor.cost import free_memory, weights_bytes
from calib_guidance.cli.doctor.files import Found, NoDownloadError, Unbuilt, all_options, is_weights, leave_out
from calib_guidance.cli.doctor.report import Report, amount, duration
from calib_guidance.cli.lightning import innermost
from calib_guidance.data.loading import take_reports
from calib_guidance.tasks import DenoiseImages, GuidedSampling

_CHECKPOINTS = 3  # that may lie side by side: the last one, its predecessor, one that is being written


@dataclass
class Parts:
    """What was built.

    Attributes:
        data: requests or images; None where they cannot be built.
        callbacks: those that can be built.
        trainer: the run's, or a plain one on the CPU where that cannot be.
        module: the model on the trainer's device; None where it cannot be built, or not in this memory.
        twin: the same on the meta device, which has shapes and no numbers.
        batch: first batch of images; None for runs that have none, or where they are not here.
        epoch: training batches per epoch and device; None where they are not known.
        trains: whether it is for ``fit``.
    """

    data: L.LightningDataModule | None
    callbacks: list[L.Callback]
    trainer: L.Trainer
    module: L.LightningModule | None
    twin: L.LightningModule | None
    trains: bool
    batch: dict[str, Tensor] | None = None
    epoch: int | None = None


def check_parts(cli: Unbuilt, found: Found, report: Report) -> Parts:
    """Build everything and let each part check the others; what is wrong is reported."""
    data_options = cli.options.get("data")
    workers = 0
    if data_options is not None and "num_workers" in data_options.init_args:
        workers, data_options.init_args.num_workers = data_options.init_args.num_workers, 0
    # A data set inside of requests is opened where it is made.
    openable = data_options is not None and (found.has_images or "images" not in data_options.init_args)
    data = _build(cli, "data", data_options, found, report) if openable else None
    callbacks, trainer = _build_trainer(cli, found, report)
    module, twin = _build_model(cli, trainer, found, report)
    parts = Parts(data, callbacks, trainer, module, twin, cli.trains)
    for model in filter(None, (module, twin)):
        model.trainer = trainer
        model.log = lambda *args, **kwargs: None  # there is no run to log for
    trainer.datamodule = data
    if data is None and openable:
        report.add("wrong", "there is no data to run on: see above, and name it under data")
    elif data is not None:
        data.trainer = trainer
    if twin is not None:
        _describe(twin, report)
        if data is not None:
            _check_together(parts, found.has_images, workers, report)
    with report.attempt("output"):
        _check_output(parts, report)
    return parts


def _build(cli: Unbuilt, name: str, options: object, found: Found, report: Report, label: str | None = None) -> Any:
    """A part; with random weights in place of files that do not fit. None where it cannot be built."""
    while options is not None:
        try:
            return cli.build(name, options)
        except Exception as error:
            cause = innermost(error)
            report.add("note" if isinstance(cause, NoDownloadError) else "wrong", f"{label or name}: {cause}")
            culprit = next((o for o in found.weights if o.value is not None and o.value in str(cause)), None)
            if culprit is None:
                return None
            found.leave_out(culprit)


def _build_trainer(cli: Unbuilt, found: Found, report: Report) -> tuple[list[L.Callback], L.Trainer]:
    callbacks = []
    for node in cli.options.trainer.callbacks or []:
        label = node.class_path.rpartition(".")[2]
        callbacks += _build(cli, "trainer.callbacks", [node], found, report, label) or []
    options = copy.deepcopy(cli.options.trainer)
    options.callbacks = None
    with report.attempt("trainer"):
        built = cli.build("trainer", options)
        built.callbacks = callbacks
        cli.config_init = Namespace({cli.subcommand: Namespace(trainer=built)})
        trainer = cli.instantiate_trainer()
        device = trainer.strategy.root_device
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        report.add("ok", f"trainer: {trainer.world_size} × {here}, precision {trainer.precision}")
        if device.type == "cpu" and cli.options.trainer.accelerator == "auto":
            report.add("note", "no GPU is found here: the run would use the CPU")
        return callbacks, trainer
    return callbacks, L.Trainer(accelerator="cpu", devices=1, logger=False, inference_mode=False)


def _build_model(
    cli: Unbuilt, trainer: L.Trainer, found: Found, report: Report
) -> tuple[L.LightningModule | None, L.LightningModule | None]:
    if found.undescribed:
        report.add(
            "missing",
            "the architecture of a network stands in a file that is not here, so that the model is not looked at:",
            "fetch the file first, or name the network beside its checkpoint",
        )
        return None, None
    options = cli.options.model
    for option in list(all_options(options, "model")):
        if option.key == "compile" and option.value:
            option.owner[option.key] = False
            report.add("note", f"{option.name} is left out here: the run's first minutes go into compiling")
    bare = copy.deepcopy(options)
    without = [option for option in all_options(bare, "model") if is_weights(option)]
    for option in without:
        leave_out(option)
    twin = None
    with contextlib.suppress(Exception), torch.device("meta"):  # what is wrong is seen when it is built below
        twin = cli.build("model", bare).to("meta")
    size = all_weights_bytes(twin) if twin else 0
    device = trainer.strategy.root_device
    if size > (free := free_memory(device)) / 2:
        report.add(
            "note", f"the model's weights take {amount(size)} of {amount(free)} that are free here: no step is run"
        )
        return None, twin
    module = _build(cli, "model", options, found, report)
    if module is not None:
        if twin is None or any(option.key == "vae" for option in without):  # a folder's autoencoder may be any
            twin = copy.deepcopy(module).to("meta")
        module = trainer.precision_plugin.convert_module(module.to(device))
    return module, twin


def _with_hidden(module: L.LightningModule) -> list[nn.Module]:
    """The module, and the diffusion model that an input transform keeps out of its sight."""
    frozen = getattr(getattr(module, "input_transform", None), "frozen", None)
    return [module] if frozen is None else [module, frozen.module]


def all_weights_bytes(module: L.LightningModule) -> int:
    """Of the module and of what it hides."""
    return sum(map(weights_bytes, _with_hidden(module)))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _describe(twin: L.LightningModule, report: Report) -> None:
    children = dict(twin.named_children()) | dict(
        zip(("", "input_transform.denoiser"), _with_hidden(twin), strict=False)
    )
    for name, child in children.items():
        count = sum(p.numel() for p in child.parameters())
        if name and count:
            shape, classes = getattr(child, "image_shape", None), getattr(child, "num_classes", None)
            words = [
                f"{count / 1e6:,.2f} M parameters",
                shape and f"samples {_shape(shape)}",
                classes and f"{classes} classes",
            ]
            report.add("ok", f"{name}: {type(child).__name__}, {', '.join(filter(None, words))}")
    if isinstance(twin, GuidedSampling):
        with report.attempt("sampler"):
            count = twin.sampler.num_evaluations(twin.denoiser)
            report.add("ok", f"sampler: {type(twin.sampler).__name__}, {count} network evaluations per image")


def _check_together(parts: Parts, has_images: bool, workers: int, report: Report) -> None:
    """What the modules themselves check before a run, and the first batch of images."""
    module, data, before = parts.module or parts.twin, parts.data, report.counts["wrong"]
    with report.attempt(f"{type(module).__name__} with {type(data).__name__}"):
        if isinstance(module, GuidedSampling):
            for problem in module.problems():
                report.add("wrong", problem)
        elif isinstance(module, DenoiseImages):
            module.check()
            parts.batch = next(iter(data.predict_dataloader()))
        else:
            if has_images:
                data.prepare_data()
                data.setup("fit")
            module.setup("fit")
            for callback in parts.callbacks:
                if isinstance(callback, ExportClassifier):
                    callback.setup(parts.trainer, module, "fit")
            if has_images:
                _read_batch(parts, workers, report)
        if report.counts["wrong"] == before:
            classes, name = getattr(data, "num_classes", None), type(data).__name__
            count = "" if parts.trains else f"{len(data):,} requests, "
            known = f"{count}{classes} classes, which fit the model" if classes else "images of this size fit the model"
            report.add("ok", f"{name}: {known}")


def _read_batch(parts: Parts, workers: int, report: Report) -> None:
    loader = parts.data.train_dataloader()
    started = time.perf_counter()
    batch = next(iter(loader))
    reading = time.perf_counter() - started
    take_reports(batch)
    parts.batch, parts.epoch = batch, len(loader)
    image, label = batch["image"], batch["label"]
    report.add(
        "ok",
        f"images: {parts.epoch:,} batches of {len(image)} per epoch and device, {_shape(image.shape[1:])} in "
        f"[{image.min():.2f}, {image.max():.2f}], labels {label.min()} … {label.max()}",
        f"the first batch was read in {duration(reading)} by one process"
        + (f"; the run has {workers}" if workers else ""),
    )
    if image.abs().max() > 1.01 or not image.isfinite().all():
        report.add("wrong", "images must lie in [-1, 1]: let data.init_args.train_transform make 8-bit images")


def _check_output(parts: Parts, report: Report) -> None:
    """Whether the folders can take what is written; nothing is written here."""
    folder = Path(parts.trainer.default_root_dir)
    for callback in parts.callbacks:
        if isinstance(callback, SampleWriter):
            folder = callback.target(parts.trainer)
            with report.attempt("the run that is in the folder"):
                if callback.earlier_run(parts.trainer):
                    report.add(
                        "note",
                        f"{folder} holds a run, which will be removed"
                        if callback.restart
                        else f"{folder} holds a run, which goes on if nothing differs that changes its samples",
                    )
    nearest = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        report.add("wrong", f"{folder} cannot be written: set trainer.default_root_dir to a folder that can")
        return
    size, free = _output_bytes(parts), shutil.disk_usage(nearest).free
    cure = ["set trainer.default_root_dir to a place with more"] if size > free else []
    report.add(
        "wrong" if size > free else "ok", f"output: up to {amount(size)} into {folder}, {amount(free)} are free", *cure
    )


def _output_bytes(parts: Parts) -> float:
    """Samples as if not compressed, or checkpoints with two numbers of the optimizer's for each weight."""
    if parts.twin is None:
        return 0
    if parts.trains:
        return _CHECKPOINTS * 3 * weights_bytes(parts.twin)
    denoiser = parts.twin.denoiser if isinstance(parts.twin, GuidedSampling) else _with_hidden(parts.twin)[1]
    with torch.no_grad():
        shape = denoiser.decode(torch.zeros(1, *denoiser.image_shape, device="meta")).shape[1:]
    return 0 if parts.data is None else len(parts.data) * (math.prod(shape) + 100)
