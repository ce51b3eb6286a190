"""Lightning callbacks: what is written, measured and drawn."""

from calib_guidance.callbacks.calibration_report import CalibrationReport
from calib_guidance.callbacks.clip_score import TrajectoryCLIPScore
from calib_guidance.callbacks.export_classifier import ExportClassifier
from calib_guidance.callbacks.export_weights import ExportWeights
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.callbacks.quality import SampleQuality
from calib_guidance.callbacks.requeue import RequeueBetweenSteps
from calib_guidance.callbacks.run_report import RunReport
from calib_guidance.callbacks.sample_writer import SampleWriter
from calib_guidance.callbacks.step_seeds import StepSeeds
from calib_guidance.callbacks.trajectory import GradientNorm, TrajectoryCalibration
from calib_guidance.callbacks.trajectory_strips import TrajectoryStrips

__all__ = [
    "CalibrationReport",
    "ExportClassifier",
    "ExportWeights",
    "GradientNorm",
    "Measurement",
    "RequeueBetweenSteps",
    "RunReport",
    "SampleQuality",
    "SampleWriter",
    "StepSeeds",
    "TrajectoryCLIPScore",
    "TrajectoryCalibration",
    "TrajectoryStrips",
]
