"""What it costs to keep samples so that a run can be stopped at any instant, and whether memory grows with their number.

    python benchmarks/run_folder.py

Encoding, checksums, writing to the disk (with fsync), claiming, renewing and looking at the folder are timed inside runs of the
shipped digits configuration, against the seconds that the same run samples. For ADM at 128×128 they are timed per image on
smooth noise, which compresses like photographs do at best, and compared with one step of the network on this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from calib_guidance.callbacks import SampleWriter
from calib_guidance.lightning_cli import run_lightning
from calib_guidance.networks import UNet
from calib_guidance.run_folder import RunFolder

CONFIG = "lightning_configs/predict/digits.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


class Clock:
    """Seconds inside the outermost of the wrapped functions."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def wrap(self, owner: type, name: str) -> None:
        """Time a method."""
        function: Callable[..., object] = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.inside = False

        setattr(owner, name, timed)


def predict(folder: str, samples: int, steps: int, shard: int, *more: str) -> None:
    """Sample digits without measuring them."""
    run_lightning(
        [
            "predict",
            f"--config={CONFIG}",
            *more,
            f"--trainer.default_root_dir={folder}",
            f"--data.init_args.num_samples={samples}",
            f"--data.init_args.batch_size={min(shard, 100)}",
            f"--data.init_args.shard_size={shard}",
            f"--model.init_args.sampler.init_args.steps={steps}",
            *QUIET,
        ]
    )


def digits(samples: int) -> None:
    """Share of keeping samples in the shipped configuration."""
    clock = Clock()
    for owner, names in {
        SampleWriter: ("_begin", "_tell", "_keep", "_write"),
        RunFolder: ("remaining", "claim", "state", "holds", "renew", "release"),
    }.items():
        for name in names:
            clock.wrap(owner, name)
    with tempfile.TemporaryDirectory() as folder:
        predict(folder, samples, 100, 100)
        run = RunFolder.open(folder)
        sampling = sum(run.record(shard)["seconds"] for shard in run.shards())
    print(
        f"digits, {samples} samples in shards of 100: keeping {1e3 * clock.seconds / samples:.3f} ms per image, sampling "
        f"{1e3 * sampling / samples:.1f} ms: {100 * clock.seconds / sampling:.2f} %"
    )


def adm128(shard: int) -> None:
    """What one image of 128×128 costs, and one step of ADM's network."""
    writer = SampleWriter()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shard, 3, 32, 32, generator=generator)
    images = F.interpolate(noise, scale_factor=4, mode="bicubic") / 3 + 0.01 * torch.randn(shard, 3, 128, 128)
    columns = {"index": torch.arange(shard), "label": torch.arange(shard), "seed": torch.zeros(shard, dtype=torch.long)}

    class Trainer:
        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

    with tempfile.TemporaryDirectory() as folder:
        writer.run = RunFolder(folder, shard, shard)
        writer.run.begin({}, {})
        writer.measurements = {}
        writer._forget()
        started = time.perf_counter()
        writer.run.claim(range(shard))
        writer._keep(columns | {"image": images})
        encoded = time.perf_counter()
        writer._write(range(shard), Trainer)
        done = time.perf_counter()
        size = writer.run.record(range(shard))["bytes"]
    network = UNet(
        128, 3, 256, 6, 2, (4, 8, 16), channel_mult=(1, 1, 2, 3, 4), num_classes=1000, num_heads=4,
        use_scale_shift_norm=True, resblock_updown=True,
    ).eval()  # fmt: skip
    with torch.no_grad():
        x, t, y = torch.randn(1, 3, 128, 128), torch.tensor([500]), torch.tensor([0])
        network(x, t, y)
        begun = time.perf_counter()
        network(x, t, y)
        step = time.perf_counter() - begun
    cost = (done - started) / shard
    print(
        f"128×128, shard of {shard}: {1e3 * cost:.2f} ms per image (encoding "
        f"{1e3 * (encoded - started) / shard:.2f}, writing {1e3 * (done - encoded) / shard:.2f}), {size / shard / 1e3:.0f} kB; "
        f"ADM-128 takes {step:.2f} s a step here, {250 * step:.0f} s for 250 without guidance: {100 * cost / 250 / step:.4f} %. "
        f"It is 0.1 % where an image takes {1e3 * cost:.1f} s"
    )


def memory(samples: int) -> int:
    """Peak resident memory in kB of a process that makes so many digits, in two steps each."""
    with tempfile.TemporaryDirectory() as folder:
        callbacks = {"trainer": {"callbacks": [{"class_path": "calib_guidance.callbacks.SampleWriter"}]}}
        path = Path(folder, "callbacks.yaml")
        path.write_text(yaml.safe_dump(callbacks))
        command = [sys.executable, __file__, "--run", f"{folder}/run", str(samples), str(path)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        folder, samples, overlay = options.run
        predict(folder, int(samples), 2, 100, f"--config={overlay}")
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    else:
        adm128(64)
        digits(options.samples)
        few, many = memory(1000), memory(10000)
        share = 100 * (many / few - 1)
        print(f"peak memory: {few / 1e3:.0f} MB for 1,000 samples, {many / 1e3:.0f} MB for 10,000: {share:+.1f} %")
