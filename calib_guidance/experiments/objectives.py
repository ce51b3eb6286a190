"""What settings are ranked by: a metric, the precision–recall area, or a metric at a fixed value of another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.metrics import METRICS

AREA = "pr_area"
_AT_LEAST = re.compile(r"([\w.]+)@([\w.]+)>=([\d.]+)")


@dataclass(frozen=True)
class Objective:
    """A number to make small, of the metrics of a run.

    ``fd`` is the metric (negative where higher is better); ``pr_area`` −precision·recall, the area below a point of the
    precision–recall plane; ``classifier_accuracy@recall>=0.8`` the metric where the other one is reached, and worse than every
    such value by how much is lacking where it is not.
    """

    text: str
    key: str
    floor_key: str | None = None
    floor: float = 0.0

    @property
    def keys(self) -> tuple[str, ...]:
        """The metrics that it needs."""
        if self.key == AREA:
            return "precision", "recall"
        return (self.key,) if self.floor_key is None else (self.key, self.floor_key)

    def of(self, values: Mapping[str, float], sign: int | None = None) -> float:
        """The number, lowest is best, of metrics by key; ``sign`` is −1 where higher is better, None for what METRICS say."""
        if self.key == AREA:
            return -values["precision"] * values["recall"]
        if sign is None:
            sign = -1 if self.key in METRICS and METRICS[self.key].higher_is_better else 1
        value = sign * values[self.key]
        if self.floor_key is None or values[self.floor_key] >= self.floor:
            return value
        # All that lack something come after all that do not, in order of what they lack.
        return 1e9 * (1 + self.floor - values[self.floor_key]) + math.atan(value)


def parse_objective(text: str, where: str) -> Objective:
    """The objective that ``by`` names."""
    if "@" not in text:
        return Objective(text, text)
    found = _AT_LEAST.fullmatch(text.replace(" ", ""))
    if found is None:
        raise ConfigurationError(f"{where}: by: expected METRIC, {AREA} or METRIC@METRIC>=NUMBER, got {text!r}")
    return Objective(text, found[1], found[2], float(found[3]))
