"""What it costs to keep a run stoppable at any instant, and whether memory grows with their number.

    python benchmarks/run_folder.py

The first table times complete runs, from their first batch to their last file. Runs that write samples beside the next batch, as
shipped, are compared with runs that write each batch before the next one starts; their files are compared first, byte for byte.
A device that leaves the CPU alone is simulated: its samples are there after a pause.

Encoding, checksums, writing to the disk (with fsync), claiming, renewing and looking at the folder are then timed inside runs
of the shipped digits configuration that write each batch before the next one starts, against the seconds that the same run
samples. For ADM at 128×128 they are timed per image on smooth noise, which compresses like photographs do at best, and
compared with one step of the network on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from timing import Ratio, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks import SampleWriter, sample_writer
from calib_guidance.cli.lightning import CalibGuidanceCLI, run_lightning
from calib_guidance.networks import UNet
from calib_guidance.runs import RunFolder
from calib_guidance.runs.claims import Claims

RATIOS: dict[str, Ratio] = {}

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


class AtOnce(sample_writer.Background):
    """Does each job before it returns."""

    def give(self, job: Callable[[], object]) -> None:
        self._do(job)
        self.check()


class Prepared(CalibGuidanceCLI):
    """All parts made, and nothing run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Stopwatch(L.Callback):
    """Seconds from the first batch to the last file; list it last."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started


@contextlib.contextmanager
def only_the_writer() -> Iterator[str]:
    """An overlay without measurements, as an argument."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "callbacks.yaml")
        path.write_text(
            yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "calib_guidance.callbacks.SampleWriter"}]}})
        )
        yield f"--config={path}"


def smooth_noise(count: int, side: int) -> Tensor:
    """RGB images ``(N, 3, side, side)`` that compress as photographs do at best."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, side // 4, side // 4, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return F.interpolate(noise, scale_factor=4, mode="bicubic") / 3 + 0.01 * fine


def beside(name: str, rounds: int, samples: int, batch: int, steps: int, pause: float = 0.0, side: int = 0) -> None:
    """One line of the table: digits in so many steps, or images that are there after a pause (seconds per batch)."""
    root = tempfile.TemporaryDirectory()  # of the configuration; samples go elsewhere, a folder for each run
    with only_the_writer() as overlay:
        cli = predict(root.name, samples, steps, 2 * batch, overlay, batch=batch, cli=Prepared)
    cli.trainer.callbacks.append(stopwatch := Stopwatch())
    if pause:
        images = smooth_noise(batch, side)

        def attempt(batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], Tensor]:
            time.sleep(pause)
            return {"image": images}, torch.full((len(images),), torch.nan, dtype=torch.float64)

        cli.model.attempt = attempt

    def run(kind: type[sample_writer.Background]) -> tuple[float, float, dict[str, bytes]]:
        """Seconds of the run and of sampling, and the files."""
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(sample_writer, "Background", kind):
            cli.trainer._default_root_dir = folder
            cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
            folder = RunFolder.open(folder)
            sampling = sum(folder.record(shard)["seconds"] for shard in folder.shards())
            return stopwatch.seconds, sampling, {path.name: path.read_bytes() for path in folder.samples.iterdir()}

    assert run(AtOnce)[2] == run(sample_writer.Background)[2], "what is written differs"
    before, after, sampling = [], [], []
    for _ in range(rounds):
        seconds, alone, _ = run(AtOnce)
        before.append(1e3 * seconds / samples)
        sampling.append(1e3 * alone / samples)
        after.append(1e3 * run(sample_writer.Background)[0] / samples)
    root.cleanup()
    found = RATIOS[f"{name}: kept first / beside the next"] = ratio(before, after)
    kept = [statistics.median(b - s for b, s in zip(times, sampling, strict=True)) for times in (before, after)]
    print(
        f"| {name} | {statistics.median(sampling):.2f} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | "
        f"{kept[0]:.2f} | {kept[1]:.2f} | {found} |",
        flush=True,
    )


def predict(
    folder: str,
    samples: int,
    steps: int,
    shard: int,
    *more: str,
    batch: int = 100,
    cli: type[CalibGuidanceCLI] = CalibGuidanceCLI,
) -> CalibGuidanceCLI:
    """Sample digits without measuring them."""
    return run_lightning(
        [
            "predict",
            f"--config={CONFIG}",
            *more,
            f"--trainer.default_root_dir={folder}",
            f"--data.init_args.num_samples={samples}",
            f"--data.init_args.batch_size={min(shard, batch)}",
            f"--data.init_args.shard_size={shard}",
            f"--model.init_args.sampler.init_args.steps={steps}",
            *QUIET,
        ],
        cli,
    )


def digits(samples: int) -> None:
    """Fraction of the time that keeping samples takes, in the shipped configuration."""
    clock = Clock()
    for owner, names in {
        SampleWriter: ("begin", "_write"),
        sample_writer._Shard: ("add",),
        RunFolder: ("remaining", "state"),
        Claims: ("acquire", "holds", "renew", "release"),
    }.items():
        for name in names:
            clock.wrap(owner, name)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sample_writer, "Background", AtOnce):
        predict(folder, samples, 100, 100)
        run = RunFolder.open(folder)
        sampling = sum(run.record(shard)["seconds"] for shard in run.shards())
    print(
        f"digits, {samples} samples in shards of 100: keeping {1e3 * clock.seconds / samples:.3f} ms per image, sampling "
        f"{1e3 * sampling / samples:.1f} ms: {100 * clock.seconds / sampling:.2f} %"
    )


def adm128(shard: int) -> None:
    """What one image of 128×128 costs, and one step of ADM's network."""
    writer, images = SampleWriter(), smooth_noise(shard, 128)
    columns = {"index": torch.arange(shard), "label": torch.arange(shard), "seed": torch.zeros(shard, dtype=torch.long)}
    columns["image"] = to_uint8(images)
    with tempfile.TemporaryDirectory() as folder:
        writer.run, writer._device, writer._class_names = RunFolder(folder, shard, shard), "cpu", None
        writer.run.begin({}, {})
        writer._shard, writer._background = sample_writer._Shard(), sample_writer.Background(1)
        started = time.perf_counter()
        writer.run.claims.acquire(range(shard))
        writer._shard.add(range(shard), columns, [], writer._background.pool)
        encoded = time.perf_counter()
        writer._write(range(shard), {})
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
    with tempfile.TemporaryDirectory() as folder, only_the_writer() as overlay:
        command = [sys.executable, __file__, "--run", f"{folder}/run", str(samples), overlay.removeprefix("--config=")]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Print the tables."""
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--samples", type=int, default=300, help="of the digits (%(default)s)")
    arguments.add_argument(
        "--only-table", action="store_true", help="complete runs alone, without the memory and ADM-128"
    )
    arguments.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.run:
        folder, samples, overlay = options.run
        predict(folder, int(samples), 2, 100, f"--config={overlay}")
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        sys.exit()
    print(f"{machine()}, {options.rounds} rounds; ms per image, medians\n")
    print(
        "| run | sampling alone | each batch kept first | beside the next | keeping, first | keeping, beside | ratio (range) |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    # Only the last batch has no next one to hide its cost behind.
    beside("simulated device, 128×128, 50 ms per image", options.rounds, 96, 8, 2, 0.4, 128)
    beside("simulated device, 32×32, 5 ms per image", options.rounds, 384, 32, 2, 0.16, 32)
    beside("digits on the CPU, 2 steps", options.rounds, 400, 50, 2)
    beside("digits on the CPU, 25 steps", options.rounds, 200, 50, 25)
    keep(options.json, "run_folder", RATIOS)
    if not options.only_table:
        adm128(64)
        digits(options.samples)
        few, many = memory(1000), memory(10000)
        fraction = 100 * (many / few - 1)
        print(f"peak memory: {few / 1e3:.0f} MB for 1,000 samples, {many / 1e3:.0f} MB for 10,000: {fraction:+.1f} %")


if __name__ == "__main__":
    main()
