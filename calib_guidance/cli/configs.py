"""Named configurations, files that are based on others, and the weights and foreign code that they name. Needs no torch."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from calib_guidance.backend.shipped import find_file, shipped
from calib_guidance.backend.text import dump_yaml, parse_yaml, read_yaml
from calib_guidance.errors import ConfigurationError
from calib_guidance.weights.cards import no_such_file

TRUSTED = ("calib_guidance", "torch", "lightning", "torchmetrics", "torchvision", "timm")
_OPTIONS = ("--config", "-c")
_INNER = re.compile(r"--(model|data)(\.\w+){2,}")
_ROOT = "lightning_configs"
# Folder of a command's configurations, where it is not the command's own name.
_FOLDER = {"validate": "fit", "test": "fit", "experiment": "experiments", "doctor": "predict", "app": "predict"}


def configuration_names() -> list[str]:
    """Names of the configurations that come with the package, such as ``sampler/ddim``."""
    return _names_below(shipped(_ROOT))


@functools.cache
def _names_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_configuration(value: str, command: str | None = None, folder: Path = Path(), by: str = "--config") -> Path:
    """The file that an option or a key (``by``, for messages) names, with or without ``.yaml``.

    An existing path, relative to ``folder``, wins. Then a name: below ``lightning_configs/COMMAND``, below ``lightning_configs``,
    or the end of exactly one name there (``resnet101_js`` for ``predict/imagenet128/resnet101_js``).
    """
    if (folder / value).is_file():
        return folder / value
    name = PurePosixPath(value.removesuffix(".yaml").removeprefix(f"{_ROOT}/")).as_posix()
    names, command_folder = configuration_names(), _FOLDER.get(command, command)
    first = [each for each in (f"{command_folder}/{name}", name) if each in names]
    found = first[:1] or [each for each in names if each.endswith(f"/{name}")]
    if len(found) == 1:
        return shipped(f"{_ROOT}/{found[0]}.yaml")
    if found:
        raise ConfigurationError(f"{by}: several configurations are named {value!r}: give one of {', '.join(found)}")
    ours_last = sorted(names, key=lambda each: each.startswith(f"{command_folder}/"))
    known = {each.rpartition("/")[2]: each for each in ours_last} | {each: each for each in names}
    near = dict.fromkeys(known[each] for each in difflib.get_close_matches(name, known, 3, 0.7))
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    file = f"a file in {folder}" if folder != Path() else "a file"
    what = f"{value!r} is neither {file} nor the name of a configuration{hint}"
    raise ConfigurationError(f"{by}: {what}; `calib-guidance configs` lists the names")


def named_texts(node: object, key: str = "", inside: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Key and text of every string below a node of a configuration, also in the YAML files that it names.

    Raises ConfigurationError for such a file, of a classifier for example, that is not valid YAML.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            yield from named_texts(value, name, inside)
    elif isinstance(node, list):
        for value in node:
            yield from named_texts(value, "", inside)
    elif isinstance(node, str):
        yield key, node
        if node.endswith((".yaml", ".yml")) and node not in inside and (path := find_file(node)).is_file():
            yield from named_texts(read_yaml(path), "", (*inside, node))


def with_bases(path: Path, command: str | None, above: tuple[Path, ...] = ()) -> list[str]:
    """The files that ``path`` is based on, and what it says itself, as a file or as YAML text."""
    if path.resolve() in above:
        raise ConfigurationError(f"{path} is based on itself, by way of {', '.join(map(str, above))}")
    content = read_yaml(path)  # its errors name the file that a base leads to
    list(named_texts(content))  # and so for the files that it names
    if not isinstance(content, dict) or "base" not in content:
        return [str(path)]
    bases = content.pop("base")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigurationError(f"{path}: base must be a configuration file or name, or a list of them, got {bases!r}")
    files, above = [], (*above, path.resolve())
    for base in bases:
        files += with_bases(find_configuration(base, command, path.parent, f"{path}, base"), command, above)
    return [*files, dump_yaml(content)] if content else files


def _is_text(value: str) -> bool:
    """Whether the value of ``--config`` is YAML itself."""
    return any(mark in value for mark in ("\n", "{", ": "))


def expand_bases(argv: Sequence[str]) -> list[str]:
    """Arguments of a command in which every configuration is a file or YAML text, preceded by those it is based on.

    A file may say ``base: FILE`` or ``base: [FILE, …]``: paths relative to itself, or names. It overrides them, as a later
    ``--config`` would.
    """
    expanded, rest, command = [], list(argv), next(iter(argv), None)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if _INNER.fullmatch(option) and (value if equals else next(iter(rest), None)) == "null":
            del rest[: not equals]
            node: object = None
            for part in reversed(option[2:].split(".")):
                node = {part: node}
            # As a configuration: of an option within two parts, jsonargparse takes null for a text.
            expanded += ["--config", dump_yaml(node)]
            continue
        if option not in _OPTIONS or not (equals or rest):
            list(named_texts(value if equals else argument))  # files that are not valid YAML are named at once
            expanded.append(argument)
            continue
        value = value if equals else rest.pop(0)
        values = [value] if _is_text(value) else with_bases(find_configuration(value, command), command)
        expanded += [each for value in values for each in ("--config", value)]
    return expanded


_DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")
_listed: set[str] = set()


def foreign_names(node: object) -> Iterator[str]:
    """Dotted names from outside TRUSTED that a value names, in YAML files that it names as well."""
    for key, text in named_texts(node):
        for part in text.split(","):
            found = _DOTTED.fullmatch(part)
            if found is None or (name := found[1]) in TRUSTED:
                continue
            here = Path(f"{name}.py").exists() or Path(name, "__init__.py").exists()
            is_module = here or importlib.util.find_spec(name) is not None
            if key == "class_path" or (is_module and not Path(part).is_file()):
                yield part


def list_foreign(argv: Sequence[str]) -> None:
    """Print the names that the arguments of a command, and the files they name, have from outside TRUSTED; each once."""
    parsed: list[object] = []
    for value in (re.sub(r"^--?[\w.+-]*=?", "", argument) for argument in argv):
        with contextlib.suppress(yaml.YAMLError, RecursionError):  # the parser of the command says what is wrong
            parsed.append(parse_yaml(value) if re.search(r"[{[\n]|: ", value) else value)
    if names := dict.fromkeys(name for name in foreign_names(parsed) if name not in _listed):
        _listed.update(names)
        print(f"calib-guidance: this runs code from outside {', '.join(TRUSTED)}: {', '.join(names)}", file=sys.stderr)


# Parts whose weights are files, unless their names have neither folder nor ending.
_WITH_WEIGHTS = {"ADMDenoiser", "EDMDenoiser", "EDM2Denoiser", "DiTDenoiser", "FlowDenoiser"}
_WITH_WEIGHTS |= {"NoiseAwareClassifier", "OffTheShelfClassifier", "CLIPClassifier"}


def _merged(old: Any, new: Any) -> Any:
    """One configuration over another; the options of another class are dropped."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "class_path" in new and new["class_path"] != old.get("class_path"):
        old = {}
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _nested(node: Any) -> Any:
    """A configuration without the levels ``init_args``, and with dotted keys as mappings."""
    if isinstance(node, list):
        return [_nested(each) for each in node]
    found: Any = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        value = _nested(value)
        for part in reversed(str(key).split(".")):
            value = value if part == "init_args" else {part: value}
        found = _merged(found, value or {})
    return found if isinstance(node, dict) else node


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings of a configuration."""
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _parts(each)


def check_weights(argv: Sequence[str]) -> None:
    """Raise CheckpointError for a weights file that the arguments of :func:`expand_bases` name and that is not there.

    Before anything is imported, and only where it is certain: building the parts finds all.
    """
    if any(re.match(r"--print_config|-h$|--([\w.]+\.)?help", argument) for argument in argv):
        return
    final, rest = {}, list(argv)
    while rest:
        option, _, value = rest.pop(0).partition("=")
        if not option.startswith("-"):
            continue
        value = value or (rest.pop(0) if rest and not rest[0].startswith("--") else "")
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
            is_config = option in _OPTIONS
            node = parse_yaml(Path(value).read_text() if is_config and not _is_text(value) else value)
            final = _merged(final, _nested(node if is_config else {option.lstrip("-"): node}))
    for part in _parts(final):
        loads = str(part.get("class_path")).rpartition(".")[2] in _WITH_WEIGHTS
        for option in ("checkpoint", "weights") if loads else ():
            value = part.get(option)
            is_file = isinstance(value, str) and (option == "checkpoint" or "/" in value or "." in value)
            if is_file and value != "None" and not value.startswith("hf://") and not find_file(value).exists():
                raise no_such_file(find_file(value))


def configs(argv: Sequence[str]) -> None:
    """``calib-guidance configs``: the named configurations, a line each."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance configs",
        description="List the configurations that --config and base: find by name.",
        epilog="A command looks in its own folder first: `calib-guidance predict --config digits` is predict/digits.",
    )
    parser.add_argument("text", nargs="?", default="", help="list only names that contain this, e.g. imagenet128")
    text = parser.parse_args(argv).text
    found = [name for name in configuration_names() if text in name]
    if not found:
        raise ConfigurationError(f"no configuration has {text!r} in its name; `calib-guidance configs` lists all")
    width = max(map(len, found))
    print(f"in {shipped(_ROOT)}:\n")
    for name in found:
        about = shipped(f"{_ROOT}/{name}.yaml").read_text().partition("\n")[0]  # a comment
        print(f"{name:{width}}  {about.removeprefix('# ')}")
