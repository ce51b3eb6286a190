"""Errors that the command line shows as one message, without a traceback."""


class ConfigurationError(ValueError):
    """Parts of a configuration that cannot go together, found before any work is done."""
