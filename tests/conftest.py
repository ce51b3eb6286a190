import copy
import functools
import gc
import json
import os
import signal
from pathlib import Path

# Threads that fight over cores are many times slower than one, and two processes run in some tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process: others import torch first
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # the compiler has this CPU's vectors: trying takes 8 seconds
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls

import pytest
import torch
from safetensors.torch import load_file

from calib_guidance.backend.light_imports import defer_imports
from tests import sketches

gc.disable()  # until all tests are collected; a tenth of their time went into looking at what is imported and stays
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for jobs in the background
defer_imports()  # before Lightning is imported
sketches.begin()
os.fsync = lambda file: None  # kills end processes here, never the machine
PARITY = Path(__file__).parent / "parity"
ROOT = Path(__file__).parent.parent


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_unconfigure(config):
    gc.unfreeze()


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


@pytest.fixture(scope="session", autouse=True)
def _heldout_digits_measured_once():
    """Most runs are compared to them, by one classifier's features."""
    from calib_guidance.data.digits import DigitImages
    from calib_guidance.evaluation.features import ClassifierFeatures
    from calib_guidance.evaluation.statistics import ReferenceStatistics
    from calib_guidance.runs.identity import hash_state

    original, known = ReferenceStatistics.measured, {}

    def measured(self, extractor, batch_size=64, keep_features=False, spatial=True, processes=None):
        dataset = getattr(getattr(self.images, "source", None), "images", None)
        alone = processes is None or processes.world_size == 1
        if type(dataset) is not DigitImages or type(extractor) is not ClassifierFeatures or not alone:
            return original(self, extractor, batch_size, keep_features, spatial, processes)
        what = (
            dataset.images.numpy().tobytes(),
            self.images.source.uint8_rule,
            repr(extractor.provenance()),
            hash_state(extractor),
        )
        key = *what, batch_size, keep_features, spatial, self.mean is None
        if key not in known:
            known[key] = copy.deepcopy(vars(original(self, extractor, batch_size, keep_features, spatial, processes)))
            del known[key]["images"]
        vars(self).update(copy.deepcopy(known[key]))
        extractor.eval()
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceStatistics, "measured", measured)
        yield


@pytest.fixture
def in_root(monkeypatch):
    """The repository root as working directory, where the paths of the shipped YAML files lead."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _entry_points_looked_up_once():
    """Every Trainer reads those of all installed packages."""
    from lightning.fabric.utilities import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def _parts_read_once():
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
