"""The scripts of docs/ as modules, which pages are made with."""

import importlib.util

from tests.conftest import ROOT


def docs_script(name):
    """A new module of docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
