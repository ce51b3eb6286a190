"""Errors that the command line shows as one message, without a traceback."""


class ConfigurationError(ValueError):
    """Parts of a configuration that cannot go together, found before any work is done."""


class RunError(RuntimeError):
    """A run that has to end although its configuration is sound. What it has written whole stays, and can be gone on from.

    Attributes:
        status: exit status of the command.
    """

    status = 1


class StoppedError(RunError):
    """A run that stopped early and cleanly: the same command does what is left."""

    status = 4


class LeftOutError(RunError):
    """A run that is complete but for samples that could not be made."""

    status = 3


class OutOfMemoryError(RunError):
    """Not even the smallest batch fits into the memory."""


class CheckpointError(RuntimeError):
    """A weights file that is missing, unreadable or made for another architecture."""
