"""Speed and peak memory of ``calib-guidance export`` and ``status`` over the number of samples. ``python benchmarks/export.py``

Folders of 128×128 RGB images (noise, which PNG cannot compress: the largest files that there are), each command in a process of
its own.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from calib_guidance.runs import RunFolder

COMMANDS = {
    "status": ["status"],
    "status --verify": ["status", "--verify"],
    **{f"export --to {form}": ["export", "--to", form] for form in ("npz", "png", "hf")},
}


def make(folder: Path, num_samples: int, size: int, shard_size: int) -> None:
    """A run that is done; every shard holds the same images, which costs no less to read."""
    images = np.random.default_rng(0).integers(0, 256, (shard_size, size, size, 3), dtype=np.uint8)
    pngs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        pngs.append({"bytes": buffer.getvalue(), "path": None})
    numbers = ("index", "label", "seed")
    features = datasets.Features(dict.fromkeys(numbers, datasets.Value("int64")) | {"image": datasets.Image()})
    run = RunFolder(folder, shard_size, num_samples)
    run.begin({}, {})
    for shard in run.shards():
        indices = list(shard)
        columns = {"index": indices, "label": [i % 1000 for i in indices], "seed": [0] * len(indices)}
        table = pa.Table.from_pydict(columns | {"image": pngs[: len(indices)]}, schema=features.arrow_schema)
        run.claims.acquire(shard)
        run.write(shard, table, seconds=1.0)


def measure(words: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a command."""
    # Its own account: what the system tells its parent begins with the parent's size.
    program = (
        "import sys; from calib_guidance.cli import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--shard-size", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number in options.samples:
            make(Path(root, str(number)), number, options.size, options.shard_size)
        columns = "".join(f" | {number} samples" for number in options.samples)
        print(f"| command{columns} |\n|---|{'---:|' * len(options.samples)}")
        for name, (command, *words) in COMMANDS.items():
            found = [measure([command, str(Path(root, str(number))), *words]) for number in options.samples]
            print(f"| {name} | " + " | ".join(f"{seconds:.1f} s, {mib:.0f} MiB" for seconds, mib in found) + " |")


if __name__ == "__main__":
    main()
