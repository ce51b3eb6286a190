"""The page: what there is of the runs, put into the template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup, escape

from calib_guidance import __version__
from calib_guidance.report import pictures, tables
from calib_guidance.report.runs import Run

T = TypeVar("T")


def _breakable(key: str) -> Markup:
    """A dotted key or a path that may be broken after its dots and slashes, with what every key says in a lighter color."""
    text = str(escape(key))
    for sign in "./":
        text = text.replace(sign, f"{sign}<wbr>")
    return Markup(text.replace("init_args.", '<span class="faint">init_args.</span>'))


def _of_each(runs: Sequence[Run], what: str, make: Callable[..., T | None], *arguments: Any) -> list[T]:
    made = [run.attempt(what, make, *arguments) for run in runs]
    return [each for each in made if each is not None]


def _measurements(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Tables of what predict and of what evaluate measured."""
    for name, measured in (("predict", [run.metrics for run in runs]), ("evaluate", [run.evaluation for run in runs])):
        title, sound = f"What {name} measured", []
        for run, each in zip(runs, measured, strict=True):
            sound.append(each if run.attempt(title, lambda run, of: tables.table([run], [of]), each) else {})
        if (table := tables.table(runs, sound)) is not None:
            yield {"id": name, "title": title, "table": table}


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
    of_samples, others = tables.differences(runs)
    return environment.get_template("page.html").render(
        version=__version__,
        title=f"Guided samples: {', '.join(run.name for run in runs)}",
        several=several,
        runs=runs,
        of_samples=of_samples,
        others=others,
        parts=[tables.parts(run) for run in runs],
        ways=list(_measurements(runs)),
        grids=[grid for each in _of_each(runs, "The grid of samples", pictures.grids, folder) for grid in each],
        side_by_side=pictures.side_by_side(runs, folder) if several else None,
        trajectory=[
            *pictures.over_steps(runs, folder),
            *_of_each(runs, "The reliability diagrams", pictures.reliability_by_level, folder),
            *_of_each(runs, "The strips over the trajectory", pictures.trajectory_strips, folder),
            *_of_each(runs, "The animation", pictures.animated, folder),
            *_of_each(runs, "The grid of scores and scales", pictures.guidance_grid, folder),
        ],
        verdicts=_of_each(runs, "What the evaluation classifier says", pictures.classified_samples),
        provenance=tables.provenance(runs),
        largest=pictures.LARGEST,
        command=f"calib-guidance report {' '.join(str(run.path) for run in runs)}",
    )
