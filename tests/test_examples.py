"""The examples in docstrings of public classes and functions."""

import doctest
import importlib
import math
import pkgutil
import re
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs/site"))
import reference

# What takes published weights or the folder of a training run, a base class, and what commands always add. Each has tests.
WITHOUT = {
    "InceptionFeatures",
    "RAEDecoder",
    "RAEEncoder",
    "HubModel",
    "Measurement",
    "ExactResume",
    "SamplingProgress",
}


def modules():
    for folder in reference.FOLDERS:
        package = importlib.import_module(f"calib_guidance.{folder}")
        yield package.__name__
        yield from (module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))


def examples(module):
    known = {"torch": torch, "np": np, "math": math}
    found = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=known)
    return [test for test in found if test.examples]


TESTS = [test for module in modules() for test in examples(module)]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_example(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("folder", reference.FOLDERS)
def test_every_public_class_has_an_example(folder):
    """In its own docstring; tasks, which need a trainer, in that of their package; callbacks in a named configuration."""
    own = {test.name for test in TESTS}
    together = "".join(e.source for test in TESTS if test.name == f"calib_guidance.{folder}" for e in test.examples)
    if folder == "callbacks":
        together = "".join(path.read_text() for path in (ROOT / "lightning_configs").rglob("*.yaml"))
    for name, module in reference.public(folder).items():
        if isinstance(getattr(importlib.import_module(module), name), type) and name not in WITHOUT:
            assert f"{module}.{name}" in own or re.search(rf"\b{name}\b", together), f"{module}.{name} has no example"
