"""Plots as most tests write them: empty PNGs of few dots, PDFs of one line. In full they take two thirds of a short run."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from calib_guidance.plots.style import DOTS_PER_INCH

in_full = Figure.savefig
REDUCTION = 4  # of the dots per inch


def _sketch(figure, path, **options):
    if options.get("format") == "pdf":
        Path(path).write_bytes(b"%PDF-")
    else:
        size = figure.get_size_inches() * DOTS_PER_INCH / REDUCTION
        Image.new("RGB", tuple(size.astype(int))).save(path, "png")


def in_few_dots(figure, path, **options):
    """What is drawn, at a quarter of its size, and PDFs of one line."""
    if options.get("format") == "pdf":
        Path(path).write_bytes(b"%PDF-")
    else:
        in_full(figure, path, **options | {"dpi": DOTS_PER_INCH / REDUCTION})


def begin():
    """From here on, in this process and those that are forked off it."""
    Figure.savefig = _sketch
