"""Commands of an experiment: resolved and checked before the first run, and their identity."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from calib_guidance.cli.configs import expand_bases
from calib_guidance.cli.doctor.files import missing_files
from calib_guidance.cli.lightning import innermost, run_lightning
from calib_guidance.cli.parsed import ParsedCLI, all_options
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.evaluation.evaluate import read_options
from calib_guidance.runs.store import file_hash, settings, sha256

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
PLACES = re.compile(r"\{\w+\}")  # in values, filled in for each run


@dataclass(frozen=True)
class Command:
    """One command of a setting. ``{seed}``, ``{folder}`` and ``{needed}`` in its values are filled in for each run."""

    stage: str  # the command writes into a folder of that name below that of the run
    name: str  # ``predict``, ``fit`` …
    configs: tuple[str, ...]  # files
    values: tuple[Mapping[str, Any], ...]  # of dotted configuration keys, common ones and those of the row

    @property
    def of_files(self) -> dict[str, str]:
        """Values that name files of this run or of the needed one, which do not exist before it."""
        texts = {key: value for values in self.values for key, value in values.items() if isinstance(value, str)}
        return {key: text for key, text in texts.items() if "{folder}" in text or "{needed}" in text}

    def argv(self, seed: int, num_samples: int, folder: Path | None = None, needed: Path | None = None) -> list[str]:
        """The command line of a run; without a folder that of no run, without the values that name files of runs."""
        own = {"data.seed": seed} if self.name == "predict" else {"seed_everything": seed}
        own |= {"data.num_samples": num_samples} if self.name == "predict" and num_samples else {}
        known = {"{seed}": seed, "{folder}": folder, "{needed}": needed}

        def fill(value: Any) -> Any:
            return seed if value == "{seed}" else PLACES.sub(lambda place: str(known[place[0]]), value)

        argv = [self.name, *(word for config in self.configs for word in ("--config", config))]
        for values in ({**own, **self.values[0]}, *self.values[1:]):
            kept = {key: value for key, value in values.items() if folder is not None or key not in self.of_files}
            filled = {key: fill(value) if isinstance(value, str) else value for key, value in kept.items()}
            argv += ["--config", yaml.safe_dump(filled, allow_unicode=True, sort_keys=False)] if filled else []
        return [*argv, f"--trainer.default_root_dir={(folder or Path()) / self.stage}", *QUIET]


class Resolver:
    """Resolves and checks commands, each once; so does it make their parsers, which takes longest."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Namespace] = {}
        self._clis: dict[str, ParsedCLI] = {}

    def resolve(self, command: Command, where: str) -> Namespace:
        """The configuration of a command, without values that name files of runs."""
        argv = tuple(command.argv(seed=0, num_samples=1))
        if argv not in self._known:
            try:
                cli = self._parse(argv)
                self._known[argv] = copy.deepcopy(cli.options)
                if command.name == "predict":
                    _build(cli)
            except (ValueError, RuntimeError, CheckpointError) as error:
                raise ConfigurationError(f"{where}: {innermost(error)}") from error
        return self._known[argv]

    def _parse(self, argv: Sequence[str]) -> ParsedCLI:
        files = [file for option, file in itertools.pairwise(argv) if option == "--config" and "\n" not in file]
        try:
            if (cli := self._clis.get(argv[0])) is None:
                cli = self._clis[argv[0]] = run_lightning(argv, ParsedCLI)
            else:
                cli.parse_arguments(cli.parser, expand_bases(argv))
        except ConfigurationError:
            words = (argv[0], *(word for file in files for word in ("--config", file)))
            if words != argv and words == argv[: len(words)]:
                self._parse(words)  # says so where it is another command's model that refuses the values
            raise
        if cli.trains != (argv[0] != "predict"):
            does = "is for training" if cli.trains else "is for sampling"
            raise ConfigurationError(f"{argv[0]} cannot run {', '.join(files)}: its model {does}")
        return cli


def _build(cli: ParsedCLI) -> None:
    """Build sampling without weights, for what the constructors refuse."""
    if (module := cli.build_on_meta()) is not None:
        module.sampler.check(module.denoiser, module.guidance)
        cli.build("data", cli.options.data)


def digest_of(commands: Sequence[Command], options: Sequence[Namespace], needed: str | None) -> str:
    """Hash of all that the results of a setting depend on: the :func:`~calib_guidance.runs.store.settings` of each command.

    A value that names a file of a run counts as its text: what is in the file is a function of the commands before it, or of
    the needed setting, whose digest is part of this one.
    """
    content = []
    for command, resolved in zip(commands, options, strict=True):
        values = {key: value for key, value in resolved.as_dict().items() if key != "config"}
        parts = {key: values.pop(key) for key in ("model", "data") if values.get(key)}
        identity = [settings(part, key, trains=command.name == "fit") for key, part in parts.items()]
        # Of files that callbacks name, which may be what they write, only weights count.
        weights = [option.value for option in all_options(resolved.trainer, "trainer") if option.is_weights]
        hashes = [file_hash(path) for path in sorted(weights) if Path(path).is_file()]
        content.append([command.name, identity, values, command.of_files, hashes])
    return sha256(json.dumps([content, needed], sort_keys=True, default=str, ensure_ascii=False).encode())


def evaluate_argv(options: Mapping[str, Any]) -> list[str]:
    """Options of ``evaluate`` as on its command line."""
    given = {f"--{option}": value for option, value in options.items() if value is not False}
    return [word for option, value in given.items() for word in ([option] if value is True else [option, str(value)])]


def check_evaluation(options: Mapping[str, Any], where: str) -> None:
    """Raise ConfigurationError for options that ``evaluate`` would refuse after sampling."""
    if "reference" not in options:
        raise ConfigurationError(f"{where}: evaluate compares with a reference: add reference: FILE")
    if "output" in options:
        raise ConfigurationError(f"{where}, evaluate: results are kept with each run: remove output")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            read_options(["RUN", *evaluate_argv(options)])
        except SystemExit:
            raise ConfigurationError(f"{where}, evaluate: {said.getvalue().rpartition('error: ')[2].strip()}") from None


def check_files(options: Sequence[Namespace], evaluate: Mapping[str, Any], where: str) -> None:
    """Raise ConfigurationError for files of resolved configurations, and of an evaluation, that do not exist."""
    missing = [text for each in options for text in missing_files(each)]
    for option in ("reference", "features", "eval_classifier", "clip"):
        path = Path(str(evaluate.get(option, "")).removeprefix("classifier:"))
        if path.suffix in (".npz", ".yaml", ".yml") and not path.exists():  # not the name of a data set
            missing.append(f"evaluate: {option} {path} does not exist")
    if missing:
        raise ConfigurationError(f"{where}: {missing[0]}")
