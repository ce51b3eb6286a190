"""Metrics as torchmetrics classes, each with a pure functional twin."""

from calib_guidance.metrics.calibration import (
    CalibrationError,
    TrajectoryCalibrationError,
    calibration_bins,
    calibration_error_from_bins,
)
from calib_guidance.metrics.features import FeatureExtractor, InceptionFeatures, JudgeFeatures
from calib_guidance.metrics.frechet import FrechetDistance, frechet_distance, mean_and_covariance
from calib_guidance.metrics.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "CalibrationError",
    "FeatureExtractor",
    "FrechetDistance",
    "InceptionFeatures",
    "JudgeFeatures",
    "PrecisionRecall",
    "TrajectoryCalibrationError",
    "calibration_bins",
    "calibration_error_from_bins",
    "frechet_distance",
    "mean_and_covariance",
    "precision_recall",
]
