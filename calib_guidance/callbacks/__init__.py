"""Lightning callbacks: what is written, measured and drawn.

They need a configuration, which they store or export, and so run from YAML, through ``calib-guidance`` or
``calib_guidance.cli.main([...])``. Sampling (``lightning_configs/predict/digits.yaml``)::

    trainer:
      callbacks:
        - SampleWriter
        - TrajectoryCalibration
        - GradientNorm
        - TrajectoryStrips
        - RunReport

Training (``lightning_configs/fit/digits_classifier.yaml``)::

    trainer:
      callbacks:
        - CalibrationReport
        - {class_path: ExportClassifier, init_args: {monitor: val/nll, temperature: scalar}}
"""

from calib_guidance.callbacks.exact_resume import ExactResume
from calib_guidance.callbacks.exports import ExportClassifier, ExportWeights
from calib_guidance.callbacks.guidance_grid import GuidanceGrid
from calib_guidance.callbacks.measurement import Measurement, SampleQuality
from calib_guidance.callbacks.post_hoc_ema import PostHocEMA
from calib_guidance.callbacks.progress import SamplingProgress
from calib_guidance.callbacks.reports import CalibrationReport, RunReport
from calib_guidance.callbacks.sample_writer import SampleWriter
from calib_guidance.callbacks.trajectory import (
    GradientNorm,
    TrajectoryCalibration,
    TrajectoryCLIPScore,
    TrajectoryStrips,
)

__all__ = [
    "CalibrationReport",
    "ExactResume",
    "ExportClassifier",
    "ExportWeights",
    "GradientNorm",
    "GuidanceGrid",
    "Measurement",
    "PostHocEMA",
    "RunReport",
    "SampleQuality",
    "SampleWriter",
    "SamplingProgress",
    "TrajectoryCLIPScore",
    "TrajectoryCalibration",
    "TrajectoryStrips",
]
