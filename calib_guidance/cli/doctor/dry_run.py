"""The dry run: memory and FLOPs of a batch counted, and one batch run on the device."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from calib_guidance.backend.counters import FlopCounter, PeakMemory
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import SampleQuality, SampleWriter
from calib_guidance.cli.doctor.measure import PATIENCE, EnoughError, Meter
from calib_guidance.cli.doctor.parts import Parts, free_memory
from calib_guidance.cli.doctor.report import Report, amount, duration
from calib_guidance.cli.lightning import innermost
from calib_guidance.tasks import GuidedSampling

_LARGE = 5e8  # bytes of weights that make a CPU slow


def _device_clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A batch of ``count``, with rows repeated where there are fewer."""
    return {k: v[torch.arange(count) % len(v)] for k, v in batch.items() if isinstance(v, Tensor)}


class DryRun:
    """One batch of a run.

    Args:
        parts: of the run; their weights may be random.
        report: takes the findings.
    """

    def __init__(self, parts: Parts, report: Report):
        self.parts, self.report = parts, report

    def run(self) -> None:
        """Count memory and FLOPs of a batch, run one, and report memory, values and time."""
        if self.parts.twin is None or self.parts.batch is None:
            self.report.add("note", "no batch is run: its parts could not be built")
            return
        size = getattr(self.parts.data, "batch_size", 1)
        count = min(size, 2) if self.parts.trains else getattr(self.parts.twin, "group_size", 1)  # BatchNorm needs two
        fits = self._count(count, size)
        if self.parts.module is None:
            return
        if not self.parts.fits_together:
            self.report.add("note", "no batch is run: first correct what does not fit together")
            return
        if self.parts.device.type == "cpu" and self.parts.weights_bytes > _LARGE:
            self.report.add("note", "one batch is run on the CPU now, which may take minutes")
        with self.report.attempt("one batch"):
            meter = self._run_batch(count)
            if fits and count < size and sum(meter.range(kind)[1] for kind in meter.laps) * size / count < PATIENCE:
                count, meter = size, self._run_batch(size)
            if self.parts.random:
                self.report.add("note", "values are not checked: missing weights were replaced by random ones")
            else:
                self._check_values(meter.values)
            self._report_time(meter, count, size)

    def _count(self, least: int, size: int) -> bool:
        """Report memory and FLOPs on the meta device; False if a batch does not fit."""
        try:
            (_, small), (flops, full) = (self._count_batch(count) for count in (least, size))
        except Exception as error:  # a module that reads values, which the meta device does not have
            self.report.add("note", f"memory and FLOPs cannot be counted for these parts ({innermost(error)})")
            return True
        # The module that was built is in memory already.
        weights = self.parts.weights_bytes
        free = free_memory(self.parts.device) + (weights if self.parts.module else 0)
        mark, text = "ok", []
        if weights + full > free:
            slope = (full - small) / max(size - least, 1)
            most = least + int((free - weights - small) / slope) // least * least if slope else 0
            cure = f"set data.batch_size to {most} or less" if most >= least else "use a device with more memory"
            mark, text = "wrong", [cure]
        self.report.add(
            mark,
            f"memory: {amount(weights)} of weights and {amount(full)} for a batch of {size}; {amount(free)} are free",
            "counted over tensors: kernels need more, mixed precision needs less",
            *text,
        )
        each = "image and training step" if self.parts.trains else "image, all steps together"
        self.report.add(
            "ok", f"operations: {amount(flops / size, ('FLOP', 'kFLOP', 'MFLOP', 'GFLOP', 'TFLOP'))} per {each}"
        )
        return mark == "ok"

    def _count_batch(self, count: int) -> tuple[float, int]:
        """FLOPs of a batch, all steps together, and the most bytes beside the weights; on the meta device."""
        twin, trainer, on_meta = self.parts.twin, self.parts.trial(), ("image", "label", "t")
        twin.trainer, plugin = trainer, trainer.precision_plugin
        batch = {k: v.to("meta") if k in on_meta else v for k, v in _rows(self.parts.batch, count).items()}
        context = plugin.train_step_context() if self.parts.trains else plugin.predict_step_context()
        with FlopCounter() as flops, PeakMemory() as memory, context, contextlib.suppress(EnoughError):
            meter = Meter(twin, flops.get_total_flops)
            if not self.parts.trains:
                twin.attempt(batch, float32=False)
            else:
                twin.train()
                twin.on_fit_start()
                found = twin.configure_optimizers()
                twin.training_step(batch, 0).backward()
                (found["optimizer"] if isinstance(found, dict) else found).step()
            meter.lap("batch")
        return meter.total()[1], memory.peak

    def _run_batch(self, count: int) -> Meter:
        """Let Lightning run one batch of a size, or its first steps."""
        module, data = self.parts.module, self.parts.data
        meter = Meter(module, functools.partial(_device_clock, self.parts.device))
        averages = [callback for callback in self.parts.callbacks if isinstance(callback, WeightAveraging)]
        if self.parts.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.parts.device)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EnoughError):
            trainer = self.parts.trial(callbacks=[*averages, meter], default_root_dir=folder)
            if self.parts.trains:
                batch = _rows(self.parts.batch, count)
                trainer.fit(module, DataLoader([batch] * 3, batch_size=None), DataLoader([batch], batch_size=None))
                return meter
            size, data.batch_size = data.batch_size, count
            try:
                trainer.predict(module, datamodule=data, return_predictions=False)
            finally:
                data.batch_size = size
        if meter.batch_size < min(count, len(data)) and isinstance(module, GuidedSampling):
            cure = f"set data.batch_size to {meter.batch_size} or less"
            self.report.add(
                "wrong", f"a batch of {count} does not fit into the memory of {self.parts.device_name}", cure
            )
        return meter

    def _check_values(self, values: dict[str, Tensor]) -> None:
        """Whether tensors are finite and in their range."""
        before = self.report.counts["wrong"]
        for name, value in values.items():
            if not value.isfinite().all():
                cure = "set the network's dtype, or trainer.precision, to bfloat16 or 32 bits"
                self.report.add("wrong", f"{name} is not finite: {cure}")
        if any(name.startswith("gradient") and not value.any() for name, value in values.items()):
            self.report.add("wrong", "the gradient is zero everywhere: it would guide or train nothing")
        if (image := values.get("image")) is not None:
            self._check_images(image)
        if self.report.counts["wrong"] == before:
            ranges = [f"{name} in [{value.min():.3g}, {value.max():.3g}]" for name, value in values.items()]
            self.report.add("ok", f"values are finite: {', '.join(ranges)}")

    def _check_images(self, image: Tensor) -> None:
        if image.abs().max() > 1.5:
            self.report.add("wrong", f"images are in [{image.min():.2f}, {image.max():.2f}], expected [-1, 1]")
        for callback in self.parts.callbacks:
            if isinstance(callback, SampleWriter):
                written = to_uint8(image, callback.uint8_rule)
                if ((written == 0) | (written == 255)).float().mean() > 0.95:
                    self.report.add("wrong", "images are black and white dots: their scale is not [-1, 1]")
            elif isinstance(callback, SampleQuality):
                with self.report.attempt("the features of SampleQuality"), torch.no_grad():
                    callback.features.eval().to(image.device)(to_uint8(image, callback.uint8_rule))

    def _report_time(self, meter: Meter, count: int, size: int) -> None:
        steps = [f"{kind} {duration(*meter.range(kind))}" for kind in meter.laps]
        if self.parts.device.type == "cuda":
            steps.append(f"at most {amount(torch.cuda.max_memory_allocated(self.parts.device))} of memory")
        self.report.add("ok", f"measured on this {self.parts.device_name} with a batch of {count}: {', '.join(steps)}")
        low, high = (seconds / count for seconds in meter.total())
        each, options = f"{duration(low, high)} for each", self.parts.cli.options.trainer
        world, images = self.parts.trainer.world_size if self.parts.trainer else 1, math.inf
        if not self.parts.trains and self.parts.has_images:
            images = len(self.parts.data) / world
        elif self.parts.trains and self.parts.epoch is not None:
            epoch = self.parts.epoch * size
            text = duration(epoch * low, epoch * high)
            self.report.add("ok", f"one epoch: {text}, without data loading and validation")
            if options.max_epochs not in (None, -1):
                images = options.max_epochs * epoch
            if options.max_steps != -1:
                images = min(images, options.max_steps * size * options.accumulate_grad_batches)
        if math.isfinite(images):
            what = "images per device" if world > 1 else "images"
            text = duration(images * low, images * high)
            self.report.add("ok", f"total time: {text} for {images:,.0f} {what}, {each}")
        else:
            self.report.add("note", f"total time: {each} image; the number of images is not known")
