"""Objects and classifiers that users name: by dotted path, or by a YAML file with ``class_path`` and ``init_args``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from calib_guidance import classifiers, denoisers, networks
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers.base import Classifier
from calib_guidance.errors import ConfigurationError
from calib_guidance.weights.io import WeightsFile


def load_object(module: str, name: str, where: str, expected: str) -> Any:
    """Attribute of a module, which may lie in the working directory.

    Args:
        module, name: what to import.
        where: starts the error message.
        expected: what else could be given, for the error message.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:  # an installed command does not look there
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{where}: {error}; expected {expected}") from error


def build_described(description: object, folder: Path) -> object:
    """What ``class_path`` and ``init_args`` describe, nested as in a configuration file of a folder."""
    if isinstance(description, list):
        return [build_described(value, folder) for value in description]
    if not isinstance(description, dict):
        return description
    if "class_path" not in description:
        return {
            key: WeightsFile.beside(value, folder)
            if key in ("weights", "checkpoint") and isinstance(value, str)
            else build_described(value, folder)
            for key, value in description.items()
        }
    module, _, name = description["class_path"].rpartition(".")
    parts = [importlib.import_module(module)] if module else [classifiers, networks, denoisers]
    owner = next((part for part in parts if hasattr(part, name)), parts[-1])
    return getattr(owner, name)(**build_described(description.get("init_args") or {}, folder))


def read_classifier(path: str | Path) -> Classifier:
    """The classifier of a YAML file with ``class_path`` and ``init_args``, as ``calib-guidance fit`` exports it."""
    try:
        classifier = build_described(read_yaml(path), Path(path).parent)
    except ConfigurationError:
        raise
    except (ImportError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"classifier: {path} does not describe a classifier: {error}") from error
    if not isinstance(classifier, Classifier):
        raise ConfigurationError(
            f"classifier: {path} describes no classifier; expected class_path and init_args of one, as in the "
            "classifier.yaml that calib-guidance fit writes"
        )
    return classifier
