"""The examples in docstrings of public classes and functions."""

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
import torch

PACKAGES = ("scores", "diffusion", "denoisers", "classifiers", "samplers", "guidance", "training", "metrics")


def modules():
    for name in PACKAGES:
        package = importlib.import_module(f"calib_guidance.{name}")
        yield from (f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))


def examples(module):
    known = {"torch": torch, "np": np, "math": math}
    found = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=known)
    return [test for test in found if test.examples]


TESTS = [test for module in modules() for test in examples(module)]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_example(test):
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_has_examples(package):
    assert any(test.name.startswith(f"calib_guidance.{package}.") for test in TESTS)
