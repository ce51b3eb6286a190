"""Metrics as torchmetrics classes, each with a pure functional twin."""

from calib_guidance.metrics.calibration import (
    AdaptiveCalibrationError,
    CalibrationError,
    ClasswiseCalibrationError,
    MaximumCalibrationError,
    ReliabilityBins,
    adaptive_calibration_error,
    calibration_bins,
    calibration_error,
    calibration_error_from_bins,
    classwise_calibration_error,
    maximum_calibration_error,
)
from calib_guidance.metrics.classification import (
    Accuracy,
    BrierScore,
    NegativeLogLikelihood,
    accuracy,
    brier_score,
    negative_log_likelihood,
)
from calib_guidance.metrics.classifier_metrics import ClassifierMetrics
from calib_guidance.metrics.features import FeatureExtractor, InceptionFeatures, JudgeFeatures
from calib_guidance.metrics.frechet import FrechetDistance, frechet_distance, mean_and_covariance
from calib_guidance.metrics.levels import Levels
from calib_guidance.metrics.precision_recall import PrecisionRecall, precision_recall
from calib_guidance.metrics.smooth_calibration import SmoothCalibrationError, smooth_calibration_error

__all__ = [
    "Accuracy",
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "ClassifierMetrics",
    "ClasswiseCalibrationError",
    "FeatureExtractor",
    "FrechetDistance",
    "InceptionFeatures",
    "JudgeFeatures",
    "Levels",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "PrecisionRecall",
    "ReliabilityBins",
    "SmoothCalibrationError",
    "accuracy",
    "adaptive_calibration_error",
    "brier_score",
    "calibration_bins",
    "calibration_error",
    "calibration_error_from_bins",
    "classwise_calibration_error",
    "frechet_distance",
    "maximum_calibration_error",
    "mean_and_covariance",
    "negative_log_likelihood",
    "precision_recall",
    "smooth_calibration_error",
]
