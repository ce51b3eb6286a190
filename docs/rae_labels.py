"""Write RAE's own order of balanced labels, for `--data.labels FILE`.

    python docs/rae_labels.py 50000 labels.txt
    calib-guidance predict --config imagenet256/rae_autoguided --data.labels labels.txt

All classes have equally many labels, in an order drawn by the seed (src/sample_ddp.py of bytetriper/RAE, `equal`).
It only changes which noise meets which class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor


def balanced_labels(num_samples: int, num_classes: int = 1000, seed: int = 0) -> Tensor:
    """Labels ``(num_samples,)``; ValueError where classes cannot have equally many."""
    if num_samples % num_classes:
        raise ValueError(f"{num_samples} samples cannot be divided by {num_classes} classes")
    pool = torch.arange(num_classes).repeat_interleave(num_samples // num_classes)
    return pool[torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))]


def main(args: list[str] | None = None) -> None:
    """Write one label a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_samples", type=int, help="a multiple of the classes")
    parser.add_argument("output", type=Path, help="text file to write")
    parser.add_argument("--num-classes", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (%(default)s)")
    options = parser.parse_args(args)
    try:
        labels = balanced_labels(options.num_samples, options.num_classes, options.seed)
    except ValueError as error:
        parser.error(str(error))
    options.output.write_text("".join(f"{label}\n" for label in labels.tolist()))


if __name__ == "__main__":
    main()
