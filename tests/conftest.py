import json
import os
import signal
from pathlib import Path

# Threads that fight over cores are many times slower than one, and two processes run in some tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process: others import torch first
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls

import pytest
import torch
from safetensors.torch import load_file

from calib_guidance.backend.light_imports import defer_imports
from tests import sketches

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for jobs in the background
defer_imports()  # before Lightning is imported
sketches.begin()
PARITY = Path(__file__).parent / "parity"
ROOT = Path(__file__).parent.parent


class Golden:
    """Golden data of one fixture: ``golden["name"]`` is a tensor, ``golden.json`` the description."""

    def __init__(self, name: str):
        self.json = json.loads((PARITY / f"{name}.json").read_text())
        self.tensors = load_file(PARITY / f"{name}.safetensors")

    def __getitem__(self, name):
        return self.tensors[name]

    def weights(self, prefix="weights."):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def assert_close(self, name, value, expected=None, step=None):
        """Within the fixture's own tolerance for ``name``, that of one step where ``step`` is given."""
        tolerance = self.json["tolerance"][name]
        atol = tolerance["atol"] if step is None else tolerance.get("atol_per_step", {step: tolerance["atol"]})[step]
        expected = self[name] if expected is None else expected
        torch.testing.assert_close(
            value.double(),
            expected.double(),
            atol=atol,
            rtol=tolerance["rtol"],
            msg=lambda m: f"{name} step {step}: {m}",
        )


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture
def in_root(monkeypatch):
    """The repository root as working directory, where the paths of the shipped YAML files lead."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="module")
def parts_read_once():
    """Configurations that share most of their parts are read as an experiment reads its settings: in half of the time."""
    from calib_guidance.cli.lightning import subclasses_listed_once
    from calib_guidance.cli.parse_once import parts_parsed_once

    with subclasses_listed_once(), parts_parsed_once():
        yield


@pytest.fixture
def plots_in_full(monkeypatch):
    """Plots are written as users get them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", sketches.in_full)


def replace_cards(monkeypatch, known):
    """Other published weights than those of cards.yaml, by name."""
    from calib_guidance.weights import cards, registry

    for module in (cards, registry):
        monkeypatch.setattr(module, "CARDS", known)
