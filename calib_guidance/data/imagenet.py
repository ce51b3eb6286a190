"""The order of ImageNet's 1,000 classes: torchvision's, which every published classifier follows."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from calib_guidance.errors import ConfigurationError

# One class is "crane" to WordNet as the other is. Data sets whose names have to differ number the second.
_OTHER_NAMES = {517: ["crane2"]}


@functools.cache
def imagenet_names() -> tuple[list[str], dict[str, set[int]]]:
    """torchvision's categories in order, and the class numbers that each known name may mean.

    Known are WordNet ids (``n01440764``), synsets (``tench, Tinca tinca``) and torchvision's categories (``tench``).
    """
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    info = ImageNetInfo("imagenet-1k")
    categories = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    meanings: dict[str, set[int]] = defaultdict(set)
    names = zip(info.label_names(), info.label_descriptions(), categories, strict=True)
    for number, (wnid, synset, category) in enumerate(names):
        words = synset.split(", ")
        # Where two classes share their first word, torchvision adds another: "crane bird", "maillot tank suit".
        if category not in words and not category.startswith(f"{words[0]} "):
            raise ConfigurationError(f"ImageNet class {number} is {synset!r} to timm and {category!r} to torchvision")
        for name in (wnid, synset, category, *_OTHER_NAMES.get(number, ())):
            meanings[name].add(number)
    return categories, dict(meanings)


def read_class_names(names: str | Sequence[str] | None, num_classes: int) -> list[str] | None:
    """Names of classes by number: a list, ``imagenet``, or a text file with a name per line."""
    if names is None:
        return None
    if isinstance(names, str) and names != "imagenet":
        try:
            found = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"class_names: {names!r} is neither imagenet nor a text file: {error}") from error
    else:
        found = imagenet_names()[0] if names == "imagenet" else [str(name) for name in names]
    if len(set(found)) != num_classes or len(found) != num_classes:
        count = f"{len(found)} names, {len(set(found))} of them different, for {num_classes} classes"
        raise ConfigurationError(f"class_names: {count}: give each its own")
    return found


def same_classes(names: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """Whether two data sets or classifiers may number their classes alike; ``tench`` and ``n01440764`` are one class."""
    if any(each is None or all(name.isdecimal() for name in each) for each in (names, others)) or names == others:
        return True
    try:
        return imagenet_labels(names, "") == imagenet_labels(others, "")
    except ConfigurationError:
        return False


def imagenet_labels(names: Sequence[str], where: str) -> list[int]:
    """torchvision's class number of each class of a data set, ``where`` in messages; a subset of ImageNet's is enough."""
    _, meanings = imagenet_names()
    if unknown := [(number, name) for number, name in enumerate(names) if name not in meanings]:
        first = ", ".join(f"{name!r} (class {number})" for number, name in unknown[:5])
        raise ConfigurationError(
            f"{where}: {len(unknown)} of {len(names)} class names are not ImageNet's: {first}. Known are WordNet ids such as "
            "n01440764, synsets such as 'tench, Tinca tinca' and torchvision's categories such as 'tench'; for other classes "
            "leave data.classes null"
        )
    certain = {number for name in names if len(meanings[name]) == 1 for number in meanings[name]}
    labels = []
    for name in names:
        left = sorted(meanings[name] if len(meanings[name]) == 1 else meanings[name] - certain)
        if len(left) != 1:
            raise ConfigurationError(
                f"{where}: the class name {name!r} may mean the ImageNet classes "
                f"{', '.join(map(str, sorted(meanings[name])))}; use WordNet ids such as n01440764"
            )
        labels += left
    if twice := sorted({name for name, label in zip(names, labels, strict=True) if labels.count(label) > 1}):
        raise ConfigurationError(f"{where}: several names for one ImageNet class: {', '.join(map(repr, twice))}")
    return labels
