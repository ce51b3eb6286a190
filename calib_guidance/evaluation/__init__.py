"""Measuring sets of samples: feature extractors, reference statistics, and the metrics of both."""

from calib_guidance.evaluation.features import (
    FeatureExtractor,
    Features,
    InceptionFeatures,
    JudgeFeatures,
    ModuleFeatures,
    TimmFeatures,
    TorchvisionFeatures,
    features_from_name,
    read_classifier,
)

__all__ = [
    "FeatureExtractor",
    "Features",
    "InceptionFeatures",
    "JudgeFeatures",
    "ModuleFeatures",
    "TimmFeatures",
    "TorchvisionFeatures",
    "features_from_name",
    "read_classifier",
]
