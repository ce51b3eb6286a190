"""Metrics as torchmetrics classes, each with a pure functional twin."""

from calib_guidance.metrics.bootstrap import bootstrap_sums, jackknife_std
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
from calib_guidance.metrics.classwise import classwise_distances
from calib_guidance.metrics.density_coverage import density_coverage
from calib_guidance.metrics.frechet import (
    Extrapolation,
    covariance_root,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.levels import Levels
from calib_guidance.metrics.precision_recall import precision_recall
from calib_guidance.metrics.smooth_calibration import SmoothCalibrationError, smooth_calibration_error

__all__ = [
    "Accuracy",
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "ClassifierMetrics",
    "ClasswiseCalibrationError",
    "Extrapolation",
    "Levels",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "ReliabilityBins",
    "SmoothCalibrationError",
    "accuracy",
    "adaptive_calibration_error",
    "bootstrap_sums",
    "brier_score",
    "calibration_bins",
    "calibration_error",
    "calibration_error_from_bins",
    "classwise_calibration_error",
    "classwise_distances",
    "covariance_root",
    "density_coverage",
    "extrapolated_frechet_distance",
    "frechet_distance",
    "frechet_distance_std",
    "inception_score",
    "jackknife_std",
    "kernel_distance",
    "kernel_distance_subsets",
    "maximum_calibration_error",
    "mean_and_covariance",
    "negative_log_likelihood",
    "precision_recall",
    "sample_count_note",
    "smooth_calibration_error",
]
