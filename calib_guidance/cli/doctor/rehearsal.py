"""One step of a run, and from it what the whole run takes."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import SampleQuality, SampleWriter
from calib_guidance.cli.doctor.cost import Work, batch_work, count_cost, free_memory, sampling_work
from calib_guidance.cli.doctor.files import Found
from calib_guidance.cli.doctor.parts import Parts, all_weights_bytes
from calib_guidance.cli.doctor.report import Report, amount, duration
from calib_guidance.tasks import DenoiseImages, GuidedSampling

_PATIENCE = (
    20.0  # seconds: a step at the run's batch size tells its time better than one of one sample, if it is as short
)

_LARGE = 5e8  # bytes of weights, of networks that make a CPU wait


def rehearse(parts: Parts, found: Found, report: Report) -> None:
    """Count what a batch takes, do one step at the smallest batch size, and report memory, operations and time."""
    works = _works(parts)
    if works is None:
        report.add("note", "no step is run: its parts could not be built")
        return
    twin, size = parts.twin, getattr(parts.data, "batch_size", 1)
    least = 1 if not isinstance(twin, GuidedSampling) or twin.guidance is None else twin.guidance.group_size
    least = min(size, 2) if parts.trains else least  # BatchNorm wants two
    for module in filter(None, (parts.module, twin)):
        module.train(parts.trains)
        module.on_fit_start()
    plugin = parts.trainer.precision_plugin
    with report.attempt("one step"), plugin.train_step_context() if parts.trains else plugin.predict_step_context():
        fits = _count(works, parts, least, size, report)
        if parts.module is None:
            return
        if parts.module.device.type == "cpu" and all_weights_bytes(twin) > _LARGE:
            report.add("note", "one step is run on the CPU now, which may take minutes")
        if parts.module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(parts.module.device)
        first, values = _time(works, parts.module, least)
        if found.untrained:
            report.add("note", "values are not looked at: weights that are not here were drawn at random")
        else:
            _check_values(values, parts, report)
        count, seconds = least, first
        if sum(first) < _PATIENCE:
            seconds, _ = _time(works, parts.module, least)  # the first is slower
            if least < size and fits and sum(seconds) * size / least < _PATIENCE:
                count = size
                seconds, _ = _time(works, parts.module, size)
        steps = ", ".join(f"{work.name} {duration(s)}" for work, s in zip(works, seconds, strict=True))
        if parts.module.device.type == "cuda":
            steps += f", at most {amount(torch.cuda.max_memory_allocated(parts.module.device))} of memory"
        report.add("ok", f"measured on this {_device_name(parts)} at batch size {count}: {steps}")
        per_image = sum(work.times * s for work, s in zip(works, seconds, strict=True)) / count
        _report_time(parts, per_image, size, report)


def _works(parts: Parts) -> list[Work] | None:
    if parts.twin is None:
        return None
    if isinstance(parts.twin, GuidedSampling):
        return sampling_work(parts.twin)
    batch = parts.batch
    if batch is None:  # images that are not here yet
        shaped = parts.twin.input_transform.frozen.module if isinstance(parts.twin, DenoiseImages) else parts.data
        if getattr(shaped, "image_shape", None) is None:
            return None
        batch = {"image": torch.randn(1, *shaped.image_shape).clamp(-1, 1), "label": torch.zeros(1, dtype=torch.long)}
    return batch_work(parts.twin, {key: batch[key] for key in ("image", "label", "t") if key in batch})


def _device_name(parts: Parts) -> str:
    device = parts.trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _count(works: list[Work], parts: Parts, least: int, size: int, report: Report) -> bool:
    """Reports memory and operations; whether a batch of the run fits."""
    try:
        (_, small), (operations, full) = (count_cost(works, parts.twin, count) for count in (least, size))
    except Exception as error:  # a module that looks at its numbers, of which there are none on the meta device
        report.add("note", f"memory and operations cannot be counted for these parts ({error})")
        return True
    fits = _check_memory(parts, least, size, small, full, report)
    each, number = "image and training step" if parts.trains else "image, all steps together", operations / size
    unit, scale = next((u, s) for u, s in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 0)) if number >= s)
    report.add("ok", f"operations: {number / (scale or 1e6):,.3g} {unit} per {each}")
    return fits


def _check_memory(parts: Parts, least: int, size: int, small: int, full: int, report: Report) -> bool:
    """Whether a batch of the run fits; if not, what would."""
    weights = all_weights_bytes(parts.twin)
    # What is free now is less by the module that was built.
    free = free_memory(parts.trainer.strategy.root_device) + (weights if parts.module is not None else 0)
    text = (
        f"memory: {amount(weights)} of weights and {amount(full)} for a batch of {size}; {amount(free)} are free here"
    )
    basis = "counted tensor by tensor, without what kernels take for themselves; mixed precision takes less"
    if weights + full <= free:
        report.add("ok", text, basis)
        return True
    slope = (full - small) / max(size - least, 1)
    most = least + int((free - weights - small) / slope) // least * least if slope else 0
    cure = f"set data.init_args.batch_size to {most} or less" if most >= least else "take a device with more memory"
    report.add("wrong", text, basis, cure)
    return False


def _time(works: list[Work], module: torch.nn.Module, count: int) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of each kind of work, done once for so many samples, and what came out."""
    seconds, values = [], {}
    for work in works:
        started = time.perf_counter()
        found = work.do(module, count)
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        values |= found
    return seconds, values


def _report_time(parts: Parts, per_image: float, size: int, report: Report) -> None:
    world, images = parts.trainer.world_size, math.inf
    if parts.trains and parts.epoch is not None:
        trainer, epoch = parts.trainer, parts.epoch * size
        report.add("ok", f"one epoch: {duration(epoch * per_image)}, without reading and validation")
        if trainer.max_epochs not in (None, -1):
            images = trainer.max_epochs * epoch
        if trainer.max_steps != -1:
            images = min(images, trainer.max_steps * size * trainer.accumulate_grad_batches)
    elif not parts.trains and parts.data is not None:
        images = len(parts.data) / world
    here = f"{duration(per_image)} each on this {_device_name(parts)}"
    if math.isfinite(images):
        what = "images per device" if world > 1 else "images"
        report.add("ok", f"whole run: {duration(images * per_image)} for {images:,.0f} {what}, {here}")
    else:
        report.add("note", f"whole run: {here}; how many images there are is not known")


def _check_values(values: dict[str, Tensor], parts: Parts, report: Report) -> None:
    """Finite, and in the range that they should be in."""
    before = report.counts["wrong"]
    for name, value in values.items():
        if not value.isfinite().all():
            report.add(
                "wrong", f"{name} is not finite: set the network's dtype, or trainer.precision, to bfloat16 or 32 bits"
            )
    if any(name.startswith("gradient") and not value.any() for name, value in values.items()):
        report.add("wrong", "the gradient is zero everywhere: nothing would be guided or trained")
    if (image := values.get("image")) is not None:
        _check_images(image, parts, report)
    if report.counts["wrong"] == before:
        ranges = [f"{name} in [{value.min():.3g}, {value.max():.3g}]" for name, value in values.items()]
        report.add("ok", f"values are finite: {', '.join(ranges)}")


def _check_images(image: Tensor, parts: Parts, report: Report) -> None:
    if image.abs().max() > 1.5:
        report.add("wrong", f"images come out in [{image.min():.2f}, {image.max():.2f}], where [-1, 1] is expected")
    for callback in parts.callbacks:
        if isinstance(callback, SampleWriter):
            written = to_uint8(image, callback.uint8_rule)
            if ((written == 0) | (written == 255)).float().mean() > 0.95:
                report.add("wrong", "images come out as black and white dots: their scale is not [-1, 1]")
        elif isinstance(callback, SampleQuality):
            with report.attempt("the features of SampleQuality"):
                callback.features.eval().to(image.device)(to_uint8(image, callback.uint8_rule))
