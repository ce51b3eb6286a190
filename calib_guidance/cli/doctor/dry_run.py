"""A dry run: builds the parts of a run as the command does, checks that they fit together, and runs one batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from calib_guidance.backend.atomic import check_writable
from calib_guidance.backend.cost import GPUS
from calib_guidance.backend.counters import free_memory
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import ExportClassifier, SampleQuality, SampleWriter
from calib_guidance.cli.doctor.files import amount, duration, find_files
from calib_guidance.cli.doctor.measure import PATIENCE, EnoughError, Meter, count_batch, extrapolate
from calib_guidance.cli.lightning import innermost
from calib_guidance.cli.parsed import NoDownloadError, Option, ParsedCLI, all_options, use_random_weights
from calib_guidance.data.loading import take_reports
from calib_guidance.data.requests import POLICIES, DenoiseRequests
from calib_guidance.tasks import DenoiseImages, GuidedSampling

_COLORS = {"ok": "32", "note": "33", "missing": "31", "wrong": "31"}
_MARGIN = 0.7, 1.5  # what runs took of their estimate on a shared CPU, see benchmarks/doctor_estimate.py
_LARGE = 5e8  # bytes of weights that make a CPU slow
_CHECKPOINTS = 3  # on disk at a time: the last one, the one before, and one that is being written
# Options of the trainer that memory and time depend on, beside devices and strategy.
_KEPT = ("accelerator", "precision", "plugins", "benchmark", "deterministic", "sync_batchnorm")
_KEPT += ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "inference_mode")


def _networks(module: L.LightningModule) -> dict[str, nn.Module]:
    """Networks by name, with the denoiser that an input transform hides from its module."""
    hidden = getattr(getattr(module, "input_transform", None), "denoiser", None)
    return dict(module.named_children()) | ({} if hidden is None else {"input_transform.denoiser": hidden})


def _random_image(shape: tuple[int, ...]) -> dict[str, Any]:
    """In place of an image that is not here yet."""
    return {"image": torch.randn(shape).clamp(-1, 1), "label": 0, "index": 0}


class DryRun:
    """One batch of the run that a parsed configuration describes. Findings are printed as they come, and counted by mark.

    Weights that are missing, or do not fit, are replaced by random ones in the configuration.
    """

    def __init__(self, cli: ParsedCLI):
        self.cli, self.options, self.trains = cli, cli.options, cli.trains
        self.counts: Counter[str] = Counter()
        self.random = self.undescribed = False  # whether weights are random; whether one architecture is unknown
        self.has_images, self.fits_together, self.workers, self.weights_bytes = True, False, 0, 0
        self.callbacks: list[L.Callback] = []
        # The twin is the module on the meta device, for shapes without memory; an epoch counts training batches of a device.
        self.data = self.module = self.twin = self.batch = self.epoch = None

    def add(self, mark: str, text: str, *more: str) -> None:
        """Print a finding: the first line says what, further ones give cause and cure."""
        self.counts[mark] += 1
        shown = f"\033[{_COLORS[mark]}m{mark:<7}\033[0m" if sys.stdout.isatty() else f"{mark:<7}"
        print(f"  {shown}  " + "\n           ".join([text, *more]), flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Report any exception as ``wrong``: parts that a user wrote may fail in any way."""
        try:
            yield
        except Exception as error:
            cause = innermost(error)
            self.add("wrong", f"{what}: {cause if isinstance(cause, ValueError | RuntimeError) else repr(cause)}")

    def check_files(self) -> None:
        """Report every file, and replace those that are missing."""
        for mark, lines, option in list(find_files(self.options)):
            self.add(mark, *lines)
            if mark != "ok" and option.is_weights:
                self._randomize(option)
            elif mark != "ok" and option.key == "source":
                self.has_images = False
            elif mark != "ok" and option.key == "labels":
                option.owner[option.key] = POLICIES[0]
        if not self.counts:
            self.add("ok", "the configuration reads no files")

    def _randomize(self, option: Option) -> None:
        self.undescribed |= not use_random_weights(option)
        self.random = True

    def build(self) -> None:
        """Build every part that can be built; report what each holds and what is wrong."""
        self._build_trainer()
        self._build_model()
        self._build_data()
        if self.twin is None:
            return
        self._describe()
        if self.data is not None:
            self._check_together()
        with self.attempt("output"):
            self._check_output()

    def _build(self, name: str, node: object, label: str = "") -> Any:
        """A part, with random weights in place of files that do not fit; None if it cannot be built."""
        while True:
            try:
                return self.cli.build(name, node)
            except Exception as error:
                cause = innermost(error)
                mark = "note" if isinstance(cause, NoDownloadError) else "wrong"
                self.add(mark, f"{label or name}: {cause}")
                culprits = (o for o in all_options(node, name) if o.is_weights and o.value in str(cause))
                if (culprit := next(culprits, None)) is None:
                    return None
                self._randomize(culprit)

    def _build_trainer(self) -> None:
        """The run's trainer; and ``trial``, which makes one that runs a batch on one device and writes nothing."""
        options = copy.deepcopy(self.options.trainer)
        for node in options.callbacks or []:
            self.callbacks += self._build("trainer.callbacks", [node], node.class_path.rpartition(".")[2]) or []
        options.callbacks, trainer, kept = None, None, {"accelerator": "cpu"}
        with self.attempt("trainer"):
            built = self.cli.build("trainer", options)
            built.callbacks = self.callbacks
            self.cli.config_init = Namespace({self.cli.subcommand: Namespace(trainer=built)})
            trainer = self.cli.instantiate_trainer()
            kept = {name: built[name] for name in _KEPT}
        fixed = {"barebones": True, "devices": 1, "max_epochs": 1, "limit_predict_batches": 2, "inference_mode": False}
        self.trial = functools.partial(L.Trainer, **fixed | kept)
        self.device = self.trial().strategy.root_device
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if trainer is not None:
            self.add("ok", f"trainer: {trainer.world_size} × {self.device_name}, precision {trainer.precision}")
        self.trainer = trainer or self.trial(default_root_dir=options.default_root_dir)
        if self.device.type == "cpu" and options.accelerator == "auto":
            self.add("note", "no GPU found: the run would use the CPU")

    def _build_model(self) -> None:
        if self.undescribed:
            text = "the architecture of a network is stored in a missing file, so the model is not checked:"
            self.add("missing", text, "download the file first, or name the network beside its checkpoint")
            return
        options = self.options.model
        for option in all_options(options, "model"):
            if option.key == "compile" and option.value:
                option.owner[option.key] = False
                self.add("note", f"{option.name} is off in this check: compiling takes the run's first minutes")
        with contextlib.suppress(Exception):  # errors are reported when it is built below
            self.twin = self.cli.build_on_meta()
        if self.twin is not None:
            networks = _networks(self.twin.to("meta")).values()
            self.weights_bytes = sum(t.nbytes for net in networks for t in (*net.parameters(), *net.buffers()))
        if self.weights_bytes > (free := free_memory(self.device)) / 2:
            needed = f"{amount(self.weights_bytes)} of {amount(free)} free memory"
            self.add("note", f"the weights need {needed}: no batch is run")
            return
        self.module = self._build("model", options)
        if self.twin is None and self.module is not None:  # its constructor computes with values
            self.twin = copy.deepcopy(self.module).to("meta")

    def _build_data(self) -> None:
        node = self.options.get("data")
        if node is None:
            self.add("wrong", "there is no data: name it under data")
        elif self.has_images or "images" not in node.init_args:
            if "num_workers" in node.init_args:
                self.workers, node.init_args.num_workers = node.init_args.num_workers, 0
            self.data = self._build("data", node)
        elif isinstance(self.twin, DenoiseImages):
            options = {key: value for key, value in vars(node.init_args).items() if key != "images"}
            images = [_random_image(self.twin.networks()["denoiser"].image_shape)] * options.get("batch_size", 64)
            with self.attempt("data"):
                self.data = DenoiseRequests(images, **options)

    def _describe(self) -> None:
        for name, network in _networks(self.twin).items():
            if count := sum(p.numel() for p in network.parameters()):
                text = f"{name}: {type(network).__name__}, {count / 1e6:,.2f} M parameters"
                shape, classes = getattr(network, "image_shape", None), getattr(network, "num_classes", None)
                text += "" if shape is None else f", samples {'×'.join(map(str, shape))}"
                self.add("ok", text if classes is None else f"{text}, {classes} classes")
        if isinstance(self.twin, GuidedSampling):
            with self.attempt("sampler"):
                nfe = self.twin.sampler.nfe(self.twin.denoiser)
                self.add("ok", f"sampler: {type(self.twin.sampler).__name__}, NFE {nfe}")

    def _check_together(self) -> None:
        """The modules' own checks before a run, and the first batch."""
        module, data, before = self.module or self.twin, self.data, self.counts["wrong"]
        stage = "fit" if self.trains else "predict"
        data.trainer = module.trainer = self.trainer
        self.trainer.datamodule = data
        if self.module is not None:
            module.to(self.device)
        with self.attempt(f"{type(module).__name__} with {type(data).__name__}"):
            if isinstance(module, GuidedSampling):
                for problem in module.problems():
                    self.add("wrong", problem)
            else:
                if self.trains and self.has_images:
                    data.prepare_data()
                    data.setup(stage)
                module.setup(stage)
            for callback in (callback for callback in self.callbacks if isinstance(callback, ExportClassifier)):
                callback.setup(self.trainer, module, stage)
            self._read_batch()
        self.fits_together = self.counts["wrong"] == before
        if self.fits_together:
            count = f"{len(data):,} requests, " if not self.trains and self.has_images else ""
            classes = getattr(data, "num_classes", None)
            fits = f"{classes} classes, which fit the model" if classes else "image size fits the model"
            self.add("ok", f"{type(data).__name__}: {count}{fits}")

    def _read_batch(self) -> None:
        if not self.has_images and self.trains:
            if (shape := getattr(self.data, "image_shape", None)) is not None:
                self.batch = default_collate([_random_image(shape)])
            return
        loader = self.data.train_dataloader() if self.trains else self.data.predict_dataloader()
        started = time.perf_counter()
        self.batch = next(iter(loader))
        seconds = time.perf_counter() - started
        take_reports(self.batch)
        if not self.trains:
            return
        self.epoch, image, label = len(loader), self.batch["image"], self.batch["label"]
        self.add(
            "ok",
            f"images: {self.epoch:,} batches of {len(image)} per epoch and device, {'×'.join(map(str, image.shape[1:]))} "
            f"in [{image.min():.2f}, {image.max():.2f}], labels {label.min()} … {label.max()}",
            f"one process read the first batch in {duration(seconds, seconds)}; the run has {self.workers or 1}",
        )
        if image.abs().max() > 1.01 or not image.isfinite().all():
            self.add("wrong", "images must lie in [-1, 1]: data.train_transform must return 8-bit images")

    def _check_output(self) -> None:
        """Report whether what the run writes fits into its folder; nothing is written."""
        folder, size = Path(self.trainer.default_root_dir), 0
        for writer in (callback for callback in self.callbacks if isinstance(callback, SampleWriter)):
            with self.attempt("the run in the output folder"):
                if writer.earlier_run(self.trainer):
                    fate = "will be removed" if writer.restart else "is resumed if both make the same samples"
                    self.add("note", f"{folder} holds a run, which {fate}")
        if self.trains:  # checkpoints, with two numbers of the optimizer for each weight
            size = _CHECKPOINTS * 3 * sum(tensor.nbytes for tensor in self.twin.state_dict().values())
        elif self.data is not None and self.has_images:  # uncompressed samples
            denoiser = self.twin.networks()["denoiser"]
            with torch.no_grad():
                image = denoiser.decode(torch.zeros(1, *denoiser.image_shape, device="meta"))
            size = len(self.data) * (image.numel() + 100)
        check_writable(folder, "trainer.default_root_dir")
        places = (folder.absolute(), *folder.absolute().parents)
        free = shutil.disk_usage(next(place for place in places if place.exists())).free
        cure = [] if size <= free else ["set trainer.default_root_dir to a disk with more space"]
        room = f"output: up to {amount(size)} in {folder}, {amount(free)} of disk space are free"
        self.add("wrong" if cure else "ok", room, *cure)

    def run(self) -> None:
        """Count memory and FLOPs of a batch, run one, and report memory, values and time."""
        if self.twin is None or self.batch is None:
            self.add("note", "no batch is run: its parts could not be built")
            return
        size, group = getattr(self.data, "batch_size", 1), getattr(self.twin, "group_size", 1)
        count = min(size, 2) if self.trains else group  # BatchNorm needs two
        fits = self._count(count, size)
        if self.module is None:
            return
        if not self.fits_together:
            self.add("note", "no batch is run: first correct what does not fit together")
            return
        if self.device.type == "cpu" and self.weights_bytes > _LARGE:
            self.add("note", "one batch is run on the CPU now, which may take minutes")
        with self.attempt("one batch"):
            measured = {count: self._run_batch(count)}
            affordable = int(PATIENCE / max(measured[count].one_each, 1e-9)) * count
            if fits and (more := min(size, affordable) // group * group) > count:
                count = more
                measured[count] = self._run_batch(count)
            if self.random:
                self.add("note", "values are not checked: missing weights were replaced by random ones")
            else:
                self._check_values(measured[count].values)
            self._report_time(measured, size)

    def _rows(self, count: int) -> dict[str, Tensor]:
        """A batch of ``count``, with rows repeated where there are fewer."""
        return {k: v[torch.arange(count) % len(v)] for k, v in self.batch.items() if isinstance(v, Tensor)}

    def _count(self, least: int, size: int) -> bool:
        """Report memory and FLOPs on the meta device; False if a batch does not fit."""
        weights, cure = self.weights_bytes, []
        free = free_memory(self.device) + (weights if self.module else 0)  # what was built is in memory already
        try:
            counted = count_batch(self.twin, self._rows(size), self.trial())
            flops, full = counted.flops, counted.peak
            if weights + full > free:
                small = count_batch(self.twin, self._rows(least), self.trial()).peak
                slope = (full - small) / max(size - least, 1)
                most = least + int((free - weights - small) / slope) // least * least if slope else 0
                cure = [f"set data.batch_size to {most} or less" if most >= least else "use a device with more memory"]
        except Exception as error:  # a module that reads values, which the meta device does not have
            self.add("note", f"memory and FLOPs cannot be counted for these parts ({innermost(error)})")
            return True
        self.add(
            "wrong" if cure else "ok",
            f"memory: {amount(weights)} of weights and {amount(full)} for a batch of {size}; {amount(free)} are free",
            "counted over tensors: kernels need more, mixed precision needs less",
            *cure,
        )
        operations = amount(flops / size, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))
        each = "image and training step" if self.trains else "image, all steps together"
        self.add("ok", f"operations: {operations} per {each}")
        if not self.trains:
            rates = ", ".join(f"{name} {size / counted.seconds(gpu):.2g}" for name, gpu in GPUS.items())
            how = "from public peak rates, in the networks' own dtype; not measured"
            self.add("ok", f"expected images per second on one GPU: {rates}", how)
        return not cure

    def _run_batch(self, count: int) -> Meter:
        """Let Lightning run one batch of a size, or its first steps."""
        meter = Meter(self.module)
        averages = [callback for callback in self.callbacks if isinstance(callback, WeightAveraging)]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        loader = DataLoader([self._rows(count)] * 3, batch_size=None)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EnoughError):
            trainer = self.trial(callbacks=[*averages, meter], default_root_dir=folder)
            if self.trains:
                trainer.fit(self.module, loader, loader)
            else:
                trainer.datamodule = self.data
                trainer.predict(self.module, loader, return_predictions=False)
        if isinstance(self.module, GuidedSampling) and meter.batch_size < count:
            cure = f"set data.batch_size to {meter.batch_size} or less"
            self.add("wrong", f"a batch of {count} does not fit into the memory of {self.device_name}", cure)
        return meter

    def _check_values(self, values: dict[str, Tensor]) -> None:
        """Whether tensors are finite and in their range."""
        before = self.counts["wrong"]
        for name, value in values.items():
            if not value.isfinite().all():
                cure = "set the network's dtype, or trainer.precision, to bfloat16 or 32 bits"
                self.add("wrong", f"{name} is not finite: {cure}")
            elif name.startswith("gradient") and not value.any():
                self.add("wrong", "the gradient is zero everywhere: it would guide or train nothing")
        if (image := values.get("image")) is not None:
            outside = (image.abs() > 0.995).float().mean()  # most of it: images of black and white dots
            if image.abs().max() > 1.5 or outside > 0.95:
                scale = f"[{image.min():.2f}, {image.max():.2f}], with {outside:.0%} of the pixels at ±1 or outside"
                self.add("wrong", f"images are in {scale}; expected the scale [-1, 1]")
            for callback in (callback for callback in self.callbacks if isinstance(callback, SampleQuality)):
                with self.attempt("the features of SampleQuality"), torch.no_grad():
                    callback.features.eval().to(image.device)(to_uint8(image, callback.uint8_rule))
        if self.counts["wrong"] == before:
            ranges = [f"{name} in [{value.min():.3g}, {value.max():.3g}]" for name, value in values.items()]
            self.add("ok", f"values are finite: {', '.join(ranges)}")

    def _report_time(self, measured: dict[int, Meter], size: int) -> None:
        count, meter = max(measured.items())
        steps = [f"{kind} {duration(*meter.range(kind))}" for kind in meter.laps]
        if self.device.type == "cuda":
            steps.append(f"at most {amount(torch.cuda.max_memory_allocated(self.device))} of memory")
        cause = [] if count == size else [f"the run's batches of {size} take too long here: their times are estimated"]
        self.add("ok", f"measured on this {self.device_name} with a batch of {count}: {', '.join(steps)}", *cause)
        times = extrapolate({number: meter.total() for number, meter in measured.items()}, size)
        low, high = (seconds / size for seconds in times)
        options, world, images = self.options.trainer, self.trainer.world_size, []
        if not self.trains and self.has_images:
            images = [len(self.data) / world]
        elif self.epoch is not None:
            epoch = self.epoch * size
            self.add("ok", f"one epoch: {duration(epoch * low, epoch * high)}, without data loading and validation")
            images += [] if options.max_epochs in (None, -1) else [options.max_epochs * epoch]
            images += [] if options.max_steps == -1 else [options.max_steps * size * options.accumulate_grad_batches]
        each = f"{duration(low, high)} for each"
        if images:
            least, most = min(images) * low * _MARGIN[0], min(images) * high * _MARGIN[1]
            total = f"{duration(least, most)} for {min(images):,.0f} images"
            self.add("ok", f"total time: {total}{' per device' * (world > 1)}, {each}, without metrics and plots")
        else:
            self.add("note", f"total time: {each} image; the number of images is not known")
