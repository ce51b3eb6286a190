"""The folder of a sampling run: samples in shards, who works on them, and their state."""

from calib_guidance.runs.folder import RunFolder
from calib_guidance.runs.identity import read_run, requested
from calib_guidance.runs.store import CorruptedShardError, read_table

__all__ = ["CorruptedShardError", "RunFolder", "read_run", "read_table", "requested"]
