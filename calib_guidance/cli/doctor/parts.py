"""The parts of a run, built as the command builds them and checked against each other."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import nn

from calib_guidance.callbacks import ExportClassifier, SampleWriter
from calib_guidance.cli.doctor.files import check_files
from calib_guidance.cli.doctor.report import Report, amount, duration
from calib_guidance.cli.lightning import innermost
from calib_guidance.cli.parsed import NoDownloadError, Option, ParsedCLI, all_options, use_random_weights
from calib_guidance.data.denoise_requests import DenoiseRequests
from calib_guidance.data.loading import take_reports
from calib_guidance.data.sample_requests import POLICIES
from calib_guidance.tasks import DenoiseImages, GuidedSampling

_CHECKPOINTS = 3  # on disk at a time: the last one, the one before, and one that is being written
# Options of the trainer that memory and time depend on, beside devices and strategy.
_KEPT = ("accelerator", "precision", "plugins", "benchmark", "deterministic", "sync_batchnorm")
_KEPT += ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "inference_mode")


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def networks(module: L.LightningModule) -> list[nn.Module]:
    """The module, and the denoiser that an input transform keeps out of its sight."""
    frozen = getattr(getattr(module, "input_transform", None), "frozen", None)
    return [module] if frozen is None else [module, frozen.module]


def weights_bytes(module: L.LightningModule) -> int:
    return sum(t.nbytes for part in networks(module) for t in (*part.parameters(), *part.buffers()))


class Parts:
    """What a configuration describes.

    Args:
        cli: the parsed configuration. Weights that are missing, or do not fit, are replaced by random ones in it.
        report: takes the findings.
    """

    def __init__(self, cli: ParsedCLI, report: Report):
        self.cli, self.report, self.trains = cli, report, cli.trains
        self.weights: list[Option] = []  # options whose weights are here
        self.random = self.undescribed = False  # whether weights are random; whether one architecture is unknown
        self.has_images, self.workers = True, 0
        self.callbacks: list[L.Callback] = []
        self.trainer: L.Trainer | None = None  # the run's own
        self.data: L.LightningDataModule | None = None
        self.module: L.LightningModule | None = None
        self.twin: L.LightningModule | None = None  # on the meta device: shapes without memory
        self.batch: dict[str, Any] | None = None
        self.fits_together = True
        self.epoch: int | None = None  # training batches per epoch and device

    def check_files(self) -> None:
        """Report every file, and replace those that are missing."""
        found = check_files(self.cli.options)
        for mark, text, option in found:
            self.report.add(mark, *text)
            if option is not None and option.is_weights and mark == "ok":
                self.weights.append(option)
            elif option is not None and option.is_weights:
                self._randomize(option)
            elif option is not None and option.key == "source":
                self.has_images &= mark == "ok"
            elif option is not None and option.key == "labels" and mark != "ok":
                option.owner[option.key] = POLICIES[0]
        if not found:
            self.report.add("ok", "the configuration reads no files")

    def _randomize(self, option: Option) -> None:
        self.undescribed |= not use_random_weights(option)
        self.random = True

    def build(self) -> None:
        """Build every part that can be built; report what each holds and what is wrong."""
        self._build_trainer()
        node = self.cli.options.get("data")
        if node is None:
            self.report.add("wrong", "there is no data: name it under data")
        elif self.has_images or "images" not in node.init_args:
            if "num_workers" in node.init_args:
                self.workers, node.init_args.num_workers = node.init_args.num_workers, 0
            self.data = self._build("data", node)
        self._build_model()
        if self.twin is None:
            return
        self._describe()
        if self.data is None and isinstance(self.twin, DenoiseImages) and not self.has_images:
            self._make_images(node.init_args)
        if self.data is not None:
            self._check_together()
        with self.report.attempt("output"):
            self._check_output()

    def _build(self, name: str, node: object, label: str | None = None) -> Any:
        """A part, with random weights in place of files that do not fit; None if it cannot be built."""
        while True:
            try:
                return self.cli.build(name, node)
            except Exception as error:
                cause = innermost(error)
                mark = "note" if isinstance(cause, NoDownloadError) else "wrong"
                self.report.add(mark, f"{label or name}: {cause}")
                culprit = next((o for o in self.weights if o.value is not None and o.value in str(cause)), None)
                if culprit is None:
                    return None
                self._randomize(culprit)

    def _build_trainer(self) -> None:
        """The run's trainer; and ``trial``, which makes one for a batch on one device, which writes nothing."""
        options = copy.deepcopy(self.cli.options.trainer)
        for node in options.callbacks or []:
            label = node.class_path.rpartition(".")[2]
            self.callbacks += self._build("trainer.callbacks", [node], label) or []
        options.callbacks, kept = None, {"accelerator": "cpu"}
        with self.report.attempt("trainer"):
            built = self.cli.build("trainer", options)
            built.callbacks = self.callbacks
            self.cli.config_init = Namespace({self.cli.subcommand: Namespace(trainer=built)})
            self.trainer = self.cli.instantiate_trainer()
            kept = {name: built[name] for name in _KEPT}
        self.trial = functools.partial(
            L.Trainer,
            barebones=True,
            devices=1,
            max_epochs=1,
            limit_predict_batches=2,
            **({"inference_mode": False} | kept),
        )
        self.device = self.trial().strategy.root_device
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if self.trainer is None:
            return
        self.report.add(
            "ok", f"trainer: {self.trainer.world_size} × {self.device_name}, precision {self.trainer.precision}"
        )
        if self.device.type == "cpu" and options.accelerator == "auto":
            self.report.add("note", "no GPU found: the run would use the CPU")

    def _build_model(self) -> None:
        if self.undescribed:
            self.report.add(
                "missing",
                "the architecture of a network is stored in a missing file, so the model is not checked:",
                "download the file first, or name the network beside its checkpoint",
            )
            return
        options = self.cli.options.model
        for option in all_options(options, "model"):
            if option.key == "compile" and option.value:
                option.owner[option.key] = False
                self.report.add("note", f"{option.name} is off in this check: compiling takes the run's first minutes")
        bare = copy.deepcopy(options)
        replaced = [option for option in all_options(bare, "model") if option.is_weights]
        for option in replaced:
            use_random_weights(option)
        with contextlib.suppress(Exception), torch.device("meta"):  # errors are reported when it is built below
            self.twin = self.cli.build("model", bare).to("meta")
        self.weights_bytes = size = weights_bytes(self.twin) if self.twin else 0
        if size > (free := free_memory(self.device)) / 2:
            self.report.add("note", f"the weights need {amount(size)} of {amount(free)} free memory: no batch is run")
            return
        self.module = self._build("model", options)
        # The folder of an autoencoder says which one it is.
        if self.module is not None and (self.twin is None or any(option.key == "vae" for option in replaced)):
            self.twin = copy.deepcopy(self.module).to("meta")
            self.weights_bytes = weights_bytes(self.twin)

    def _describe(self) -> None:
        children = dict(self.twin.named_children())
        children |= dict(zip(("", "input_transform.denoiser"), networks(self.twin), strict=False))
        for name, child in children.items():
            count = sum(p.numel() for p in child.parameters())
            if name and count:
                shape, classes = getattr(child, "image_shape", None), getattr(child, "num_classes", None)
                words = [f"{count / 1e6:,.2f} M parameters", shape and f"samples {'×'.join(map(str, shape))}"]
                words.append(classes and f"{classes} classes")
                self.report.add("ok", f"{name}: {type(child).__name__}, {', '.join(filter(None, words))}")
        if isinstance(self.twin, GuidedSampling):
            with self.report.attempt("sampler"):
                count = self.twin.sampler.nfe(self.twin.denoiser)
                self.report.add("ok", f"sampler: {type(self.twin.sampler).__name__}, NFE {count}")

    def _make_images(self, options: Namespace) -> None:
        """Random images in place of those that are not here yet."""
        shape = networks(self.twin)[-1].image_shape
        image = {"image": torch.randn(shape).clamp(-1, 1), "label": 0, "index": 0}
        options = {key: value for key, value in vars(options).items() if key != "images"}
        with self.report.attempt("data"):
            self.data = DenoiseRequests([image] * options.get("batch_size", 64), **options)

    def _check_together(self) -> None:
        """The modules' own checks before a run, and the first batch."""
        module, data, before = self.module or self.twin, self.data, self.report.counts["wrong"]
        trainer = self.trainer or self.trial()
        data.trainer = module.trainer = trainer
        trainer.datamodule = data
        if self.module is not None:
            module.to(self.device)
        with self.report.attempt(f"{type(module).__name__} with {type(data).__name__}"):
            if isinstance(module, GuidedSampling):
                for problem in module.problems():
                    self.report.add("wrong", problem)
            elif isinstance(module, DenoiseImages):
                module.check()
            if not self.trains:
                self.batch = next(iter(data.predict_dataloader()))
            else:
                if self.has_images:
                    data.prepare_data()
                    data.setup("fit")
                module.setup("fit")
                for callback in self.callbacks:
                    if isinstance(callback, ExportClassifier):
                        callback.setup(trainer, module, "fit")
                self._read_batch()
        self.fits_together = self.report.counts["wrong"] == before
        if self.fits_together:
            classes = getattr(data, "num_classes", None)
            count = f"{len(data):,} requests, " if not self.trains and self.has_images else ""
            fits = f"{count}{classes} classes, which fit the model" if classes else "image size fits the model"
            self.report.add("ok", f"{type(data).__name__}: {fits}")

    def _read_batch(self) -> None:
        """The first training batch, or random images in place of those that are not here yet."""
        if not self.has_images:
            if (shape := getattr(self.data, "image_shape", None)) is not None:
                self.batch = {"image": torch.randn(1, *shape).clamp(-1, 1), "label": torch.zeros(1, dtype=torch.long)}
                self.batch["index"] = torch.zeros(1, dtype=torch.long)
            return
        loader, started = self.data.train_dataloader(), time.perf_counter()
        batch = next(iter(loader))
        reading = time.perf_counter() - started
        take_reports(batch)
        self.batch, self.epoch = batch, len(loader)
        image, label = batch["image"], batch["label"]
        self.report.add(
            "ok",
            f"images: {self.epoch:,} batches of {len(image)} per epoch and device, {'×'.join(map(str, image.shape[1:]))} "
            f"in [{image.min():.2f}, {image.max():.2f}], labels {label.min()} … {label.max()}",
            f"one process read the first batch in {duration(reading, reading)}"
            + (f"; the run has {self.workers}" if self.workers else ""),
        )
        if image.abs().max() > 1.01 or not image.isfinite().all():
            self.report.add("wrong", "images must lie in [-1, 1]: data.train_transform must return 8-bit images")

    def _check_output(self) -> None:
        """Whether the folder of the run can be written and has space; nothing is written."""
        folder = Path(self.cli.options.trainer.default_root_dir or ".")
        for callback in self.callbacks:
            if isinstance(callback, SampleWriter) and self.trainer is not None:
                folder = callback.target(self.trainer)
                with self.report.attempt("the run in the output folder"):
                    if callback.earlier_run(self.trainer):
                        fate = "will be removed" if callback.restart else "is resumed if both make the same samples"
                        self.report.add("note", f"{folder} holds a run, which {fate}")
        nearest = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            self.report.add("wrong", f"{folder} is not writable: set trainer.default_root_dir to a folder that is")
            return
        size, free = self._output_bytes(), shutil.disk_usage(nearest).free
        mark, *cure = ("ok",) if size <= free else ("wrong", "set trainer.default_root_dir to a disk with more space")
        self.report.add(mark, f"output: up to {amount(size)} in {folder}, {amount(free)} of disk space are free", *cure)

    def _output_bytes(self) -> float:
        """Uncompressed samples; or checkpoints, with two numbers of the optimizer for each weight."""
        if self.trains:
            return _CHECKPOINTS * 3 * sum(tensor.nbytes for tensor in self.twin.state_dict().values())
        if self.data is None or not self.has_images:
            return 0
        denoiser = self.twin.denoiser if isinstance(self.twin, GuidedSampling) else networks(self.twin)[-1]
        with torch.no_grad():
            shape = denoiser.decode(torch.zeros(1, *denoiser.image_shape, device="meta")).shape[1:]
        return len(self.data) * (math.prod(shape) + 100)
