"""Scores: what guidance climbs, as functions of logits and class alone."""

from calib_guidance.scores.base import Score as Score
from calib_guidance.scores.base import TemperedLogProb as TemperedLogProb
from calib_guidance.scores.regularized import DIVERGENCES as DIVERGENCES
from calib_guidance.scores.regularized import DivergenceRegularized as DivergenceRegularized
from calib_guidance.scores.regularized import EntropyRegularized as EntropyRegularized
from calib_guidance.scores.regularized import entropy as entropy
from calib_guidance.scores.tilted import Tilted as Tilted
