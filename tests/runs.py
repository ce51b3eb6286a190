"""Commands that tests run, and what they look at in the folders of runs."""

import json
from pathlib import Path

import pytest
import torch

from calib_guidance.cli import main
from calib_guidance.runs import read_table

QUICK = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


def refused(capsys, *argv):
    """The message with which a command ends that cannot run."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    assert stop.value.code == 2
    return capsys.readouterr().err


def read_samples(folder):
    """Columns of each file of samples, in order of index: ``image`` uint8 ``(N, C, H, W)``, ``index``, ``label``, ``seed`` …"""
    for path in sorted(Path(folder).glob("*.parquet")):
        yield {name: torch.from_numpy(column) for name, column in read_table(path).items()}


def samples_of(folder):
    """Columns of all samples of a run."""
    parts = list(read_samples(Path(folder) / "samples"))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def tables(folder):
    """Bytes of each file of samples of a run, by name, in order of index."""
    return {path.name: path.read_bytes() for path in sorted((Path(folder) / "samples").iterdir())}


def metrics(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def metrics_without_time(folder):
    return {key: value for key, value in metrics(folder).items() if not key.startswith("seconds")}


def flip(path, place=None):
    """Changes one bit of a file, in its middle by default."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)
