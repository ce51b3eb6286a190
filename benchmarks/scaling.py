"""Images per second by the number of processes that sample one folder, on the shipped digits configuration.

    python benchmarks/scaling.py

The processes are workers that know nothing of each other and share the cores evenly, as jobs on a machine do; on a machine with
several GPUs each takes its own. The time runs from the first shard that is written to the last. It excludes
importing libraries and loading weights, which each process does once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import Ratio, keep, machine, parser

CONFIG = "lightning_configs/predict/digits.yaml"


def sample(processes: int, images: int, folder: Path) -> float:
    """Images per second of so many processes."""
    cores = len(os.sched_getaffinity(0))
    words = ["predict", "--config", CONFIG, "--trainer.default_root_dir", str(folder), "--trainer.callbacks", "null"]
    words += ["--trainer.callbacks+=calib_guidance.callbacks.SampleWriter", "--trainer.enable_progress_bar=false"]
    words += [f"--data.init_args.num_samples={images}", "--data.init_args.batch_size=50"]
    running = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // processes))}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = str(rank % torch.cuda.device_count())
        command = [sys.executable, "-m", "calib_guidance", *words]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"a worker failed:\n{errors}")
    return _rate(folder)


def _rate(folder: Path) -> float:
    """Images per second between the first and the last shard that were written, without the first."""
    written = []
    for path in folder.glob("samples/*.parquet"):
        written.append(path.stat().st_mtime)
    rows = json.loads((folder / "run.json").read_text())["shard_size"]
    return rows * (len(written) - 1) / (max(written) - min(written))


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    arguments.add_argument("--images", type=int, default=600, help="for each run (%(default)s)")
    options = arguments.parse_args()
    found: dict[int, list[float]] = {number: [] for number in options.processes}
    with tempfile.TemporaryDirectory() as root:
        for round_ in range(options.rounds):
            for number, rates in found.items():
                rates.append(sample(number, options.images, Path(root, f"{round_}-{number}")))
    print(f"{machine()}, {options.images} images, {options.rounds} rounds\n")
    print("| processes | images per second | over one process (min … max) |\n|---:|---:|---:|")
    first, ratios = next(iter(found.values())), {}
    for number, rates in found.items():
        gain = Ratio.of([a / b for a, b in zip(rates, first, strict=True)])
        print(f"| {number} | {Ratio.of(rates)} | {gain} |")
        if rates is not first:
            ratios[f"{number} processes over {options.processes[0]}"] = gain
    keep(options.json, "scaling", ratios)


if __name__ == "__main__":
    main()
