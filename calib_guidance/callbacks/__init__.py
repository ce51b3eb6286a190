"""Lightning callbacks: what is written, measured and drawn."""

from calib_guidance.callbacks.export_weights import ExportWeights
from calib_guidance.callbacks.measurement import Measurement
from calib_guidance.callbacks.quality import SampleQuality
from calib_guidance.callbacks.run_report import RunReport
from calib_guidance.callbacks.sample_writer import SampleWriter, read_samples
from calib_guidance.callbacks.trajectory import GradientNorm, TrajectoryCalibration

__all__ = [
    "ExportWeights",
    "GradientNorm",
    "Measurement",
    "RunReport",
    "SampleQuality",
    "SampleWriter",
    "TrajectoryCalibration",
    "read_samples",
]
