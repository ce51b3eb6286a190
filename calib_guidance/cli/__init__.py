"""The command line."""

from calib_guidance.cli.commands import main

__all__ = ["main"]
