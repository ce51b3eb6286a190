"""Images per second by the number of processes that sample one folder, on the shipped digits configuration.

    python benchmarks/scaling.py

On a CPU one command starts the processes (``--workers``), which share the cores evenly. On a machine with GPUs they are commands
that know nothing of each other, and each has its own GPU. The rate is that between the first and the last shard that were
written. The seconds are those of the complete command, with imports, metrics and plots.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import Ratio, keep, machine, parser, ratio

CONFIG = "lightning_configs/predict/digits.yaml"


def sample(processes: int, images: int, folder: Path) -> tuple[float, float]:
    """Images per second of so many processes, and the seconds of the command."""
    words = ["predict", "--config", CONFIG, "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.enable_progress_bar=false", f"--data.init_args.num_samples={images}"]
    words += ["--data.init_args.batch_size=50"]
    gpus, running, started = torch.cuda.device_count(), [], time.perf_counter()
    for rank in range(processes if gpus else 1):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(rank % gpus)
        command = [sys.executable, "-m", "calib_guidance", *words, f"--workers={1 if gpus else processes}"]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"a worker failed:\n{errors}")
    return _rate(folder), time.perf_counter() - started


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
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in options.processes}
    with tempfile.TemporaryDirectory() as root:
        for round_ in range(options.rounds):
            for number, runs in found.items():
                runs.append(sample(number, options.images, Path(root, f"{round_}-{number}")))
    print(f"{machine()}, {options.images} images, {options.rounds} rounds\n")
    print("| processes | images per second | over one process (min … max) | command, s | over one process |")
    print("|---:|---:|---:|---:|---:|")
    (first_rates, first_seconds), ratios = zip(*next(iter(found.values())), strict=True), {}
    for number, runs in found.items():
        rates, seconds = zip(*runs, strict=True)
        gain, shorter = ratio(rates, first_rates), ratio(first_seconds, seconds)
        print(f"| {number} | {Ratio.of(rates)} | {gain} | {Ratio.of(seconds)} | {shorter} |")
        if number != options.processes[0]:
            ratios[f"{number} processes over {options.processes[0]}"] = gain
            ratios[f"{number} processes over {options.processes[0]}, complete command"] = shorter
    keep(options.json, "scaling", ratios)


if __name__ == "__main__":
    main()
