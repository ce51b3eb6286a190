"""Metrics of classifiers, as torchmetrics classes, and of sets of features, as functions."""

from calib_guidance.metrics.calibration import (
    AdaptiveCalibrationError,
    CalibrationError,
    ClasswiseCalibrationError,
    MaximumCalibrationError,
    OverconfidenceError,
    ReliabilityBins,
    SignedCalibrationError,
    SmoothCalibrationError,
    calibration_error_from_bins,
)
from calib_guidance.metrics.classification import Accuracy, BrierScore, Levels, NegativeLogLikelihood
from calib_guidance.metrics.collection import ClassifierMetrics
from calib_guidance.metrics.decomposition import split_brier, split_nll
from calib_guidance.metrics.frechet import (
    covariance_root,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    mean_and_covariance,
    sample_count_note,
)
from calib_guidance.metrics.inception_score import inception_score, inception_score_adm
from calib_guidance.metrics.kernel_distance import clip_mmd, kernel_distance, kernel_distance_subsets
from calib_guidance.metrics.moments import bootstrap_sums, jackknife_std
from calib_guidance.metrics.neighbors import density_coverage, in_balls, precision_recall
from calib_guidance.metrics.paired import (
    PairedDifference,
    jackknife_blocks,
    mean_difference,
    paired_difference,
    samples_to_resolve,
    sign_test,
)
from calib_guidance.metrics.selective import AreaUnderRiskCoverage, aurc, risk_coverage
from calib_guidance.metrics.sliced import mind

__all__ = [
    "Accuracy",
    "AdaptiveCalibrationError",
    "AreaUnderRiskCoverage",
    "BrierScore",
    "CalibrationError",
    "ClassifierMetrics",
    "ClasswiseCalibrationError",
    "Levels",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "OverconfidenceError",
    "PairedDifference",
    "ReliabilityBins",
    "SignedCalibrationError",
    "SmoothCalibrationError",
    "aurc",
    "bootstrap_sums",
    "calibration_error_from_bins",
    "clip_mmd",
    "covariance_root",
    "density_coverage",
    "extrapolated_frechet_distance",
    "frechet_distance",
    "frechet_distance_std",
    "in_balls",
    "inception_score",
    "inception_score_adm",
    "jackknife_blocks",
    "jackknife_std",
    "kernel_distance",
    "kernel_distance_subsets",
    "mean_and_covariance",
    "mean_difference",
    "mind",
    "paired_difference",
    "precision_recall",
    "risk_coverage",
    "sample_count_note",
    "samples_to_resolve",
    "sign_test",
    "split_brier",
    "split_nll",
]
