"""Metrics of classifiers, as torchmetrics classes, and of sets of features, as functions."""

from calib_guidance.metrics.calibration import (
    AdaptiveCalibrationError,
    CalibrationError,
    ClassifierMetrics,
    ClasswiseCalibrationError,
    MaximumCalibrationError,
    ReliabilityBins,
    SmoothCalibrationError,
    calibration_error_from_bins,
)
from calib_guidance.metrics.classification import Accuracy, BrierScore, Levels, NegativeLogLikelihood
from calib_guidance.metrics.frechet import (
    covariance_root,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score, inception_score_adm
from calib_guidance.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.moments import bootstrap_sums, jackknife_std
from calib_guidance.metrics.neighbors import density_coverage, precision_recall

__all__ = [
    "Accuracy",
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "ClassifierMetrics",
    "ClasswiseCalibrationError",
    "Levels",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "ReliabilityBins",
    "SmoothCalibrationError",
    "bootstrap_sums",
    "calibration_error_from_bins",
    "covariance_root",
    "density_coverage",
    "extrapolated_frechet_distance",
    "frechet_distance",
    "frechet_distance_std",
    "inception_score",
    "inception_score_adm",
    "jackknife_std",
    "kernel_distance",
    "kernel_distance_subsets",
    "mean_and_covariance",
    "precision_recall",
    "sample_count_note",
]
