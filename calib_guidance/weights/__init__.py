"""Weights files: reading them safely, the hub, key maps and the published models."""
