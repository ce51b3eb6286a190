"""Cards of the published weights, as ``cards.yaml`` describes them. Needs no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calib_guidance.backend.text import read_yaml
from calib_guidance.errors import CheckpointError


@dataclass(frozen=True)
class Card:
    """One published file. The attributes are explained at the top of ``cards.yaml``."""

    name: str
    kind: str
    source: str
    license: str
    used_by: str
    bytes: int
    parameters: int | None = None
    network: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    signature_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    file_name: str | None = None
    variants: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file, or of its folder."""
        return self.file_name or self.source.rpartition("/")[2]

    @property
    def where(self) -> str:
        """Where to get it, for messages."""
        return f"the public {self.name} is at {self.source} ({self.bytes / 1e6:,.0f} MB, license {self.license})"


def _read_cards() -> dict[str, Card]:
    cards = {}
    for name, values in read_yaml(Path(__file__).with_name("cards.yaml")).items():
        if name.startswith("."):  # what several cards share
            continue
        shapes = {key: tuple(shape) for key, shape in values.pop("signature_shapes", {}).items()}
        values["variants"] = tuple(values.get("variants", ()))
        values.setdefault("bytes", (2 if values["kind"] == "edm2" else 4) * values.get("parameters", 0))
        cards[name] = Card(name, signature_shapes=shapes, **values)
    return cards


CARDS: Mapping[str, Card] = MappingProxyType(_read_cards())


def entry(name: str, kind: str | None = None) -> Card:
    """The card of a name."""
    known = [card.name for card in CARDS.values() if kind in (None, card.kind)]
    if name not in known:
        raise ValueError(f"unknown published network {name!r}; known: {', '.join(known)}, or a class_path of your own")
    return CARDS[name]


def by_file(path: str | os.PathLike[str]) -> Card | None:
    """The card whose file or folder ``path`` names, in any folder; None for others."""
    parts = Path(path).parts
    for card in CARDS.values():
        if card.file in parts:
            return card
        if name := next((variant for variant in card.variants if variant in parts), None):
            return replace(card, source=f"{card.source.rpartition('/')[0]}/{name}")
    return None


def no_such_file(path: str | os.PathLike[str]) -> CheckpointError:
    """The error for weights that are not there; it says where the published ones are."""
    card = by_file(path)
    where = card.where if card else "name an existing one (see checkpoints/README.md)"
    return CheckpointError(f"{path}: no such weights file; {where}")
