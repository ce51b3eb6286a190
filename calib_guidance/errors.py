"""Errors that the command line shows as one message, without a traceback."""


class ConfigurationError(ValueError):
    """Parts of a configuration that cannot go together, found before any work is done."""


class CheckpointError(RuntimeError):
    """A weights file that is missing, unreadable or made for another architecture."""
