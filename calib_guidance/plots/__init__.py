"""Plots from saved data, as PNG and PDF, sized for one column of a paper.

Every plot takes a ``path``, see :func:`save`, and returns the files that it wrote.
"""

from calib_guidance.plots.ablation import ablation, precision_recall
from calib_guidance.plots.animation import animation
from calib_guidance.plots.curves import Series, curves, guidance_schedule, strength
from calib_guidance.plots.direction_field import Contours, direction_field
from calib_guidance.plots.fronts import fronts
from calib_guidance.plots.grids import guidance_grid, real_of_classes, sample_grid, side_by_side, strips
from calib_guidance.plots.reliability import reliability
from calib_guidance.plots.style import COLORS, COLUMN, paper, save

__all__ = [
    "COLORS",
    "COLUMN",
    "Contours",
    "Series",
    "ablation",
    "animation",
    "curves",
    "direction_field",
    "fronts",
    "guidance_grid",
    "guidance_schedule",
    "paper",
    "precision_recall",
    "real_of_classes",
    "reliability",
    "sample_grid",
    "save",
    "side_by_side",
    "strength",
    "strips",
]
