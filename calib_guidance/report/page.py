"""The page: what there is of the runs, put into the template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup, escape

from calib_guidance import __version__
from calib_guidance.report import pictures, samples, tables
from calib_guidance.report.pictures import Picture
from calib_guidance.report.runs import Run
from calib_guidance.report.settings import differences, parts

T = TypeVar("T")

# What reading and drawing raise where a file holds something else than what is written there.
_UNFIT = (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError)


def _breakable(key: str) -> Markup:
    """A dotted key or a path that may be broken after its dots and slashes, with what every key says in a lighter colour."""
    text = str(escape(key))
    for sign in "./":
        text = text.replace(sign, f"{sign}<wbr>")
    return Markup(text.replace("init_args.", '<span class="faint">init_args.</span>'))


def _attempt(run: Run, what: str, make: Callable[[], T]) -> T | None:
    """A part of the page; where what a run has kept is not what it should be, a remark in its place."""
    try:
        return make()
    except _UNFIT as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        run.remarks.append(f"{what} cannot be shown, what is kept of it is damaged: {why}.")
        return None


def _together(runs: Sequence[Run], what: str, draw: Callable[[Sequence[Run]], T]) -> T | None:
    """One plot of all runs; where some have kept what cannot be drawn, of the others."""
    try:
        return draw(runs)
    except _UNFIT:
        sound = [run for run in runs if _attempt(run, what, lambda run=run: (draw([run]),))]
        return draw(sound) if sound else None


def _over_steps(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Curves of all runs in one plot each."""
    ece = _together(runs, "ECE_t", lambda some: pictures.ece_over_t(some, folder))
    norm = _together(runs, "The gradient norm", lambda some: pictures.gradient_norm_over_t(some, folder))
    schedules = _together(runs, "The guidance schedule", lambda some: pictures.guidance_schedules(some, folder))
    return [each for each in (ece, norm, *(schedules or [])) if each is not None]


def _of_each(runs: Sequence[Run], what: str, make: Callable[..., T | None], *arguments: Any) -> list[T]:
    made = [_attempt(run, what, lambda run=run: make(run, *arguments)) for run in runs]
    return [each for each in made if each is not None]


def _ways_of_measuring(runs: Sequence[Run]) -> list[dict[str, Any]]:
    ways = [
        ("predict", "What predict measured", [run.metrics for run in runs]),
        ("evaluate", "What evaluate measured", [run.evaluation for run in runs]),
    ]
    found = []
    for name, title, measured in ways:
        sound = [
            each if _attempt(run, title, lambda run=run, each=each: tables.table([run], [each])) else {}
            for run, each in zip(runs, measured, strict=True)
        ]
        if (table := tables.table(runs, sound)) is not None:
            found.append({"id": name, "title": title, "table": table})
    return found


def render(runs: Sequence[Run], folder: Path) -> str:
    """One HTML page of one or several runs, the first being what the others are compared with.

    It carries its pictures, drawn in ``folder``, and styles in itself, has no scripts, and asks for nothing from anywhere.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calib_guidance.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    several = len(runs) > 1
    of_samples, others = differences(runs)
    return environment.get_template("page.html").render(
        version=__version__,
        title=f"Guided samples: {', '.join(run.name for run in runs)}",
        several=several,
        runs=runs,
        of_samples=of_samples,
        others=others,
        parts=[parts(run) for run in runs],
        ways=_ways_of_measuring(runs),
        grids=_of_each(runs, "The grid of samples", pictures.grid, folder),
        side_by_side=samples.side_by_side(runs, folder) if several else None,
        over_steps=_over_steps(runs, folder),
        reliability=_of_each(runs, "The reliability diagrams", pictures.reliability_by_level, folder),
        strips=_of_each(runs, "The strips over the trajectory", pictures.trajectory_strips, folder),
        verdicts=_of_each(runs, "What the evaluation classifier says", samples.classified_samples),
        provenance=tables.provenance(runs),
        largest=pictures.LARGEST,
    )
