"""The samples of a run folder, as tests look at them."""

from pathlib import Path

import torch

from calib_guidance.runs import read_table


def read_samples(folder):
    """Columns of each file of samples, in order of index: ``image`` uint8 ``(N, C, H, W)``, ``index``, ``label``, ``seed`` …"""
    for path in sorted(Path(folder).glob("*.parquet")):
        yield {name: torch.from_numpy(column) for name, column in read_table(path).items()}
