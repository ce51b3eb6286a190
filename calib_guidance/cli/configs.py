"""Named configurations, and configuration files that are based on others."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import yaml

from calib_guidance.backend.shipped import find_file, shipped
from calib_guidance.backend.text import read_yaml
from calib_guidance.errors import ConfigurationError
from calib_guidance.weights.cards import no_such_file

_OPTIONS = ("--config", "-c")
_ROOT = "lightning_configs"
# Folder of a command's configurations, where it is not the command's own name.
_FOLDER = {"validate": "fit", "test": "fit", "experiment": "experiments"}


def configuration_names() -> list[str]:
    """Names of the configurations that come with the package, such as ``sampler/ddim``."""
    root = shipped(_ROOT)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_configuration(
    value: str, command: str | None = None, folder: Path = Path(), said_by: str = "--config"
) -> Path:
    """The file that ``--config`` or ``base:`` names.

    An existing path wins. Then a name: below ``lightning_configs/COMMAND``, below ``lightning_configs``, or the end of exactly
    one name there (``resnet101_js`` for ``predict/imagenet128/resnet101_js``).

    Args:
        value: path or name, with or without ``.yaml``.
        command: for which a name is looked up first.
        folder: that relative paths start from.
        said_by: option or file that names it, for the message.
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
        raise ConfigurationError(
            f"{said_by}: several configurations are named {value!r}: give one of {', '.join(found)}"
        )
    ours_last = sorted(names, key=lambda each: each.startswith(f"{command_folder}/"))
    known = {each.rpartition("/")[2]: each for each in ours_last} | {each: each for each in names}
    near = dict.fromkeys(known[each] for each in difflib.get_close_matches(name, known, 3, 0.7))
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    no_file = f"{said_by}: {value!r} is neither a file{f' in {folder}' if folder != Path() else ''}"
    raise ConfigurationError(
        f"{no_file} nor the name of a configuration{hint}; `calib-guidance configs` lists the names"
    )


def _check_files(value: object) -> None:
    """Raise ConfigurationError for files that a configuration names, such as a classifier's, and that are not valid YAML."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and Path(value).is_file():
        read_yaml(value)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_files(each)


def with_bases(path: Path, command: str | None, above: tuple[Path, ...] = ()) -> list[str]:
    """The files that ``path`` is based on, and what it says itself, as a file or as YAML text."""
    if path.resolve() in above:
        raise ConfigurationError(f"{path} is based on itself, by way of {', '.join(map(str, above))}")
    content = read_yaml(path)  # its errors name the file that a base leads to
    _check_files(content)
    if not isinstance(content, dict) or "base" not in content:
        return [str(path)]
    bases = content.pop("base")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigurationError(f"{path}: base must be a configuration file or name, or a list of them, got {bases!r}")
    files, above = [], (*above, path.resolve())
    for base in bases:
        files += with_bases(find_configuration(base, command, path.parent, f"{path}, base"), command, above)
    return [*files, yaml.safe_dump(content, allow_unicode=True, sort_keys=False)] if content else files


def check_names(argv: Sequence[str]) -> None:
    """Raise ConfigurationError for the first ``--config`` of ``doctor`` or ``experiment`` that names nothing."""
    command = "predict" if argv[0] == "doctor" else argv[0]
    for before, argument in itertools.pairwise((*argv, "")):
        option, equals, value = before.partition("=")
        value = value if equals else argument
        if option in _OPTIONS and value and not _is_text(value):
            find_configuration(value, command)


def _is_text(value: str) -> bool:
    """Whether the value of ``--config`` is YAML itself."""
    return any(mark in value for mark in ("\n", "{", ": "))


def expand_bases(argv: Sequence[str]) -> list[str]:
    """Arguments of a command in which every configuration is a file or YAML text, preceded by those it is based on.

    A file may say ``base: FILE`` or ``base: [FILE, …]``: paths relative to itself, or names. It overrides them, as a later
    ``--config`` would.

    Args:
        argv: command and options, such as ``["predict", "--config", "digits"]``.
    """
    expanded, rest, command = [], list(argv), next(iter(argv), None)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option not in _OPTIONS or not (equals or rest):
            _check_files(value if equals else argument)
            expanded.append(argument)
            continue
        value = value if equals else rest.pop(0)
        values = [value] if _is_text(value) else with_bases(find_configuration(value, command), command)
        expanded += [each for value in values for each in ("--config", value)]
    return expanded


# Parts whose weights are files, unless their names have neither folder nor ending.
_WITH_WEIGHTS = {
    *("ADMDenoiser", "EDMDenoiser", "EDM2Denoiser", "DiTDenoiser", "FlowDenoiser", "NoiseAwareClassifier"),
    *("OffTheShelfClassifier", "CLIPClassifier"),
}


def _flat(node: object, name: str) -> Iterator[tuple[str, object]]:
    """Dotted names and values below a node of a configuration, without the levels ``init_args``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _flat(value, name if key == "init_args" else f"{name}.{key}".removeprefix("."))
    if not items:
        yield name, node


def _options(argv: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Names and values that arguments set, in order: a name that comes again replaces what is below it."""
    rest = list(argv)
    while rest:
        option, _, value = rest.pop(0).partition("=")
        if option.startswith("-"):
            value = value or (rest.pop(0) if rest and not rest[0].startswith("--") else "")
            name = "" if option in _OPTIONS else option.lstrip("-").replace(".init_args", "")
            try:
                node = yaml.safe_load(value if name or "\n" in value else Path(value).read_text())
            except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
                continue
            yield from _flat(node, name)


def check_weights(argv: Sequence[str]) -> None:
    """Raise CheckpointError for a weights file of a configuration that is not there, before anything is imported.

    Only where it is certain: building the parts finds all.

    Args:
        argv: of :func:`expand_bases`.
    """
    if any(re.match(r"--print_config|-h$|--([\w.]+\.)?help", argument) for argument in argv):
        return
    final: dict[str, object] = {}
    for name, value in _options(argv):
        final = {
            key: kept
            for key, kept in final.items()
            if not key.startswith(f"{name}.") and not name.startswith(f"{key}.")
        }
        if name.endswith(".class_path") and final.get(name) != value:  # options of another class
            part = name.removesuffix("class_path")
            final = {key: kept for key, kept in final.items() if not key.startswith(part)}
        final[name] = value
    for name, value in final.items():
        part, _, option = name.rpartition(".")
        kind = str(final.get(f"{part}.class_path")).rpartition(".")[2]
        if option in ("checkpoint", "weights") and kind in _WITH_WEIGHTS and isinstance(value, str):
            is_file = option == "checkpoint" or "/" in value or "." in value
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
