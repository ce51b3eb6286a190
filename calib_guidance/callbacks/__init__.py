"""Lightning callbacks: what is written, measured and drawn."""

from calib_guidance.callbacks.calibration_report import CalibrationReport
from calib_guidance.callbacks.clip_score import TrajectoryCLIPScore
from calib_guidance.callbacks.exact_resume import ExactResume
from calib_guidance.callbacks.export_classifier import ExportClassifier
from calib_guidance.callbacks.export_weights import ExportWeights
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.callbacks.post_hoc_ema import PostHocEMA
from calib_guidance.callbacks.quality import SampleQuality
from calib_guidance.callbacks.run_report import RunReport
from calib_guidance.callbacks.sample_writer import SampleWriter
from calib_guidance.callbacks.step_seeds import StepSeeds
from calib_guidance.callbacks.stop_between_steps import StopBetweenSteps
from calib_guidance.callbacks.trajectory import GradientNorm, TrajectoryCalibration
from calib_guidance.callbacks.trajectory_strips import TrajectoryStrips

__all__ = [
    "CalibrationReport",
    "ExactResume",
    "ExportClassifier",
    "ExportWeights",
    "GradientNorm",
    "Measurement",
    "PostHocEMA",
    "RunReport",
    "SampleQuality",
    "SampleWriter",
    "StepSeeds",
    "StopBetweenSteps",
    "TrajectoryCLIPScore",
    "TrajectoryCalibration",
    "TrajectoryStrips",
]
