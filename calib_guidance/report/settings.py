"""Settings of runs: what a run is made of, and where runs differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from calib_guidance.report.runs import Run

_UNSET = "not set"
_ELSEWHERE = {"trainer.default_root_dir"}  # the folder, by which the runs are listed


class Part(NamedTuple):
    """A class that a run is made of.

    Attributes:
        place: in the configuration, e.g. ``guidance.score``.
        name: of the class.
        settings: ``name = value`` of those that are set, in order.
    """

    place: str
    name: str
    settings: list[str]


class Difference(NamedTuple):
    """A setting that differs between runs.

    Attributes:
        key: with dots, as on the command line.
        values: of each run, as text.
        changed: of each run, whether it differs from the first.
    """

    key: str
    values: list[str]
    changed: list[bool]


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is neither mapping nor list of such.

    The callbacks go by the name of their class, so that runs with other ones are compared one by one.
    """
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from flatten(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        seen: list[str] = []
        for number, each in enumerate(value):
            name = str(number)
            if key == "trainer.callbacks":
                name = str(each.get("class_path", number)).rpartition(".")[2]
                seen.append(name)
                name += f"#{seen.count(name)}" if seen.count(name) > 1 else ""
            yield from flatten(each, f"{key}.{name}")
    else:
        yield key, value


def as_text(value: Any) -> str:
    """A setting as YAML writes it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return str(value)


def parts(run: Run) -> list[Part]:
    """What a run is made of: every class under ``model`` and ``data`` of its configuration."""
    flat = dict(flatten(run.settings)) or run.identity
    places = [key.removesuffix(".class_path") for key in flat if key.endswith(".class_path")]
    found = []
    for place in places:
        if place.partition(".")[0] not in ("model", "data"):
            continue
        inside = f"{place}.init_args."
        names = [
            key
            for key, value in flat.items()
            if key.startswith(inside)
            and value is not None
            and not any(key.startswith(f"{deeper}.") for deeper in places if deeper.startswith(inside))
        ]
        settings = [f"{name.removeprefix(inside)} = {as_text(flat[name])}" for name in names]
        shown = place.replace(".init_args", "").removeprefix("model.")
        found.append(Part(shown, flat[f"{place}.class_path"].rpartition(".")[2], settings))
    return found


def _keys(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for each in settings for key in each))


def _difference(key: str, values: Sequence[Any]) -> Difference | None:
    changed = [value != values[0] for value in values]
    texts = [_UNSET if value is _UNSET else as_text(value) for value in values]
    return Difference(key, texts, changed) if any(changed) else None


def differences(runs: Sequence[Run]) -> tuple[list[Difference], list[Difference]]:
    """Where the settings of runs differ.

    Returns:
        Those that samples are a function of, with the hashes of weights among them, and all others.
    """
    flats = [dict(flatten(run.settings)) for run in runs]
    identities = [run.identity for run in runs]
    of_samples, others = [], []
    for key in _keys(identities):
        if (by_content := _difference(key, [each.get(key, _UNSET) for each in identities])) is not None:
            # A file counts by its content in run.json; its name says more, where the names differ.
            by_name = _difference(key, [flat.get(key, _UNSET) for flat in flats])
            of_samples.append(by_name or by_content)
    known = {difference.key for difference in of_samples} | _ELSEWHERE
    if all(flats):
        for key in _keys(flats):
            difference = _difference(key, [flat.get(key, _UNSET) for flat in flats])
            if difference is not None and key not in known:
                others.append(difference)
    return of_samples, others
