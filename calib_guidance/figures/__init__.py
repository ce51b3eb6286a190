"""Figures, each from saved data, as PNG and as PDF, to be read at the width of a column."""

from calib_guidance.figures.ablation import ablation, precision_recall
from calib_guidance.figures.curves import Series, curves
from calib_guidance.figures.direction_field import Contours, direction_field
from calib_guidance.figures.grids import sample_grid, side_by_side
from calib_guidance.figures.guidance_schedule import guidance_schedule, strength
from calib_guidance.figures.reliability import reliability
from calib_guidance.figures.strips import strips
from calib_guidance.figures.style import COLOURS, COLUMN, paper, save

__all__ = [
    "COLOURS",
    "COLUMN",
    "Contours",
    "Series",
    "ablation",
    "curves",
    "direction_field",
    "guidance_schedule",
    "paper",
    "precision_recall",
    "reliability",
    "sample_grid",
    "save",
    "side_by_side",
    "strength",
    "strips",
]
