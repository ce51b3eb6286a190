"""Objects that users name: feature extractors, classifiers, and what files describe."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from calib_guidance import classifiers, denoisers, networks
from calib_guidance.backend.choices import FEATURES
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers.base import Classifier
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.features import (
    ClassifierFeatures,
    CLIPFeatures,
    EncoderFeatures,
    FeatureExtractor,
    InceptionFeatures,
    ModuleFeatures,
    TimmFeatures,
    TorchvisionFeatures,
)
from calib_guidance.weights.io import WeightsFile


def features_from_name(text: str) -> FeatureExtractor:
    """The extractor that ``--features`` names (:data:`FEATURES`), also a module of Python as :class:`ModuleFeatures` takes it."""
    kind, _, rest = text.partition(":")
    if kind == "fdr6":
        raise ConfigurationError(f"--features {text}: FDr-6 is of evaluate and reference; name one encoder, fdr:NAME")
    try:
        if kind == "inception":
            made: nn.Module = InceptionFeatures(rest or None)
        elif kind == "dinov2":
            made = TimmFeatures(weights=rest or "pretrained")
        elif kind == "clip":
            made = CLIPFeatures(rest) if rest else CLIPFeatures()
        elif kind in ("timm", "torchvision") and rest:
            name, _, weights = rest.partition(":")
            make = TimmFeatures if kind == "timm" else TorchvisionFeatures
            made = make(name, weights) if weights else make(name)
        elif kind == "fdr" and rest:
            encoder, _, weights = rest.partition(":")
            if encoder == "inception":
                made = InceptionFeatures(weights or None)
            else:
                made = EncoderFeatures(encoder, weights or "pretrained")
        elif kind == "classifier" and rest:
            made = ClassifierFeatures(read_classifier(rest))
        elif kind and rest:
            found = load_object(kind, rest, f"--features {text}", FEATURES)
            made = found if isinstance(found, nn.Module) else found() if callable(found) else None
            if not isinstance(made, nn.Module):
                expected = "neither a torch module, nor a class or function without arguments that makes one"
                raise ConfigurationError(f"--features {text} is {expected}")
            made = made if isinstance(made, FeatureExtractor) else ModuleFeatures(made)
        else:
            raise ConfigurationError(f"--features {text!r}: expected {FEATURES}")
    except (ImportError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"--features {text}: {error}") from error
    return made.eval()


def load_object(module: str, name: str, where: str, expected: str) -> Any:
    """Attribute of a module, which may lie in the working directory; errors start with ``where`` and say what is ``expected``."""
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
