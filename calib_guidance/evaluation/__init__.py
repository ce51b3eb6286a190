"""Measuring sets of samples: feature extractors, reference statistics, and the metrics of both."""

from calib_guidance.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    Features,
    InceptionFeatures,
    ModuleFeatures,
    TimmFeatures,
    TorchvisionFeatures,
    features_from_name,
    read_classifier,
)

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "Features",
    "InceptionFeatures",
    "ModuleFeatures",
    "TimmFeatures",
    "TorchvisionFeatures",
    "features_from_name",
    "read_classifier",
]
