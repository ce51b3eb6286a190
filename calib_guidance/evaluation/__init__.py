"""Measuring sets of samples: feature extractors, reference statistics, and the metric table."""

from calib_guidance.evaluation.features import (
    ClassifierFeatures,
    CLIPFeatures,
    EncoderFeatures,
    FeatureExtractor,
    Features,
    InceptionFeatures,
    ModuleFeatures,
    TimmFeatures,
    TorchvisionFeatures,
)
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.evaluation.named import features_from_name, read_classifier
from calib_guidance.evaluation.spec import Estimate, MetricSpec, SampleSet

__all__ = [
    "METRICS",
    "CLIPFeatures",
    "ClassifierFeatures",
    "EncoderFeatures",
    "Estimate",
    "FeatureExtractor",
    "Features",
    "InceptionFeatures",
    "MetricSpec",
    "ModuleFeatures",
    "SampleSet",
    "TimmFeatures",
    "TorchvisionFeatures",
    "features_from_name",
    "read_classifier",
]
