"""Lightning callbacks: what is written, measured and drawn."""

from calib_guidance.callbacks.export_weights import ExportWeights

__all__ = ["ExportWeights"]
