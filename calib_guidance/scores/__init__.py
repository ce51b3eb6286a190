"""Scores: what guidance climbs, as functions of logits and class alone."""

from calib_guidance.scores.base import Score, TemperedLogProb, tempered_log_prob
from calib_guidance.scores.regularized import (
    DIVERGENCES,
    DivergenceRegularized,
    EntropyRegularized,
    divergence_regularized,
    entropy,
    entropy_regularized,
)
from calib_guidance.scores.tilted import Tilted, tilted

__all__ = [
    "DIVERGENCES",
    "DivergenceRegularized",
    "EntropyRegularized",
    "Score",
    "TemperedLogProb",
    "Tilted",
    "divergence_regularized",
    "entropy",
    "entropy_regularized",
    "tempered_log_prob",
    "tilted",
]
