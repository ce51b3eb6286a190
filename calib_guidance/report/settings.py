"""Settings of runs: what a run is made of, and where runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib_guidance.report.runs import Run
from calib_guidance.runs.store import leaves

_UNSET = "not set"
_ELSEWHERE = {"trainer.default_root_dir"}  # the folder, by which the runs are listed


def flatten(settings: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Leaves by dotted key. Callbacks go by the name of their class, so that runs with other ones are compared one by one."""
    trainer = settings.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if isinstance(callbacks, list) and all(isinstance(each, Mapping) for each in callbacks):
        named: dict[str, Any] = {}
        for number, each in enumerate(callbacks):
            name = str(each.get("class_path", number)).rpartition(".")[2]
            named[f"{name}#{number}" if name in named else name] = each
        settings = {**settings, "trainer": {**trainer, "callbacks": named}}
    return dict(leaves(settings, key))


def as_text(value: Any) -> str:
    """A setting as YAML writes it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return str(value)


def parts(run: Run) -> list[dict[str, Any]]:
    """What a run is made of: every class under ``model`` and ``data`` of its configuration, with the settings that are set.

    Returns:
        ``place`` in the configuration, such as ``guidance.score``, ``name`` of the class, ``settings`` as ``name = value``.
    """
    flat = flatten(run.settings) or run.identity
    places = [key.removesuffix(".class_path") for key in flat if key.endswith(".class_path")]
    found = []
    for place in places:
        if place.partition(".")[0] not in ("model", "data"):
            continue
        inside = f"{place}.init_args."
        deeper = tuple(f"{other}." for other in places if other.startswith(inside))
        settings = [
            f"{key.removeprefix(inside)} = {as_text(value)}"
            for key, value in flat.items()
            if key.startswith(inside) and value is not None and not key.startswith(deeper)
        ]
        shown = place.replace(".init_args", "").removeprefix("model.")
        name = flat[f"{place}.class_path"].rpartition(".")[2]
        found.append({"place": shown, "name": name, "settings": settings})
    return found


def _difference(key: str, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ``values`` of a setting, as text, and whether each is ``changed`` from the first; None where none is."""
    values = [each.get(key, _UNSET) for each in settings]
    changed = [value != values[0] for value in values]
    texts = [_UNSET if value is _UNSET else as_text(value) for value in values]
    return {"key": key, "values": texts, "changed": changed} if any(changed) else None


def differences(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where the settings of runs differ.

    Returns:
        Those that samples are a function of, with the hashes of weights among them, and all others.
    """
    flats = [flatten(run.settings) for run in runs]
    identities = [run.identity for run in runs]
    of_samples, others = [], []
    for key in dict.fromkeys(key for each in identities for key in each):
        if by_content := _difference(key, identities):
            # A file counts by its content in run.json; its name says more, where the names differ.
            of_samples.append(_difference(key, flats) or by_content)
    known = {difference["key"] for difference in of_samples} | _ELSEWHERE
    if all(flats):
        for key in dict.fromkeys(key for each in flats for key in each):
            if key not in known and (difference := _difference(key, flats)):
                others.append(difference)
    return of_samples, others
