"""All metrics of a classifier in one collection."""

from __future__ import annotations

from torchmetrics import MetricCollection

from calib_guidance.metrics.calibration import (
    AdaptiveCalibrationError,
    CalibrationError,
    ClasswiseCalibrationError,
    MaximumCalibrationError,
    OverconfidenceError,
    ReliabilityBins,
    SignedCalibrationError,
    SmoothCalibrationError,
)
from calib_guidance.metrics.classification import Accuracy, BrierScore, NegativeLogLikelihood
from calib_guidance.metrics.selective import AreaUnderRiskCoverage


class ClassifierMetrics(MetricCollection):
    """Accuracy and calibration of a classifier, by noise level and overall.

    ``update(logits, y, level)`` counts a batch; ``compute()`` gives a :class:`~calib_guidance.metrics.Levels` for each of
    ``accuracy``, ``top5_accuracy`` (of more than five classes), ``nll``, ``brier``, ``ece``, ``adaptive_ece``,
    ``maximum_ece``, ``classwise_ece``, ``smooth_ece``, ``signed_ece``, ``overconfidence``, ``aurc``, ``excess_aurc`` and ``bins``
    (those of ``ece``, see :class:`ReliabilityBins`).

    Examples:
        >>> import torch
        >>> metrics = ClassifierMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> values = metrics.compute()
        >>> [round(float(values[name].overall), 4) for name in ("accuracy", "ece", "brier")]
        [0.5, 0.3, 0.68]
    """

    def __init__(self, num_classes: int, num_levels: int = 1):
        metrics = {
            "accuracy": Accuracy(num_levels=num_levels),
            "nll": NegativeLogLikelihood(num_levels),
            "brier": BrierScore(num_levels),
            "ece": CalibrationError(num_levels=num_levels),
            "adaptive_ece": AdaptiveCalibrationError(num_levels=num_levels),
            "maximum_ece": MaximumCalibrationError(num_levels=num_levels),
            "classwise_ece": ClasswiseCalibrationError(num_classes, num_levels=num_levels),
            "smooth_ece": SmoothCalibrationError(num_levels),
            "signed_ece": SignedCalibrationError(num_levels=num_levels),
            "overconfidence": OverconfidenceError(num_levels=num_levels),
            "aurc": AreaUnderRiskCoverage(num_levels),
            "excess_aurc": AreaUnderRiskCoverage(num_levels, excess=True),
            "bins": ReliabilityBins(num_levels=num_levels),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = Accuracy(5, num_levels)
        groups = [
            ["bins", "ece", "maximum_ece", "signed_ece", "overconfidence"],
            ["adaptive_ece", "aurc", "excess_aurc"],
        ]
        # Named, because torchmetrics by itself would merge metrics that agree on the first batch, whatever they count.
        super().__init__(metrics, compute_groups=groups)
