"""What the page shows, without the page: the same noise with and without classifier guidance."""

from __future__ import annotations

import copy
import inspect
import logging
import pkgutil
import shlex
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from calib_guidance import samplers, scores
from calib_guidance.backend.compilation import eager
from calib_guidance.backend.distributed import set_threads
from calib_guidance.backend.images import to_uint8
from calib_guidance.backend.shipped import shipped
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.smoothing import Resmoothed
from calib_guidance.cli.configs import configuration_names
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI, quietly
from calib_guidance.data.imagenet import read_class_names
from calib_guidance.denoisers.base import Predict, Prediction
from calib_guidance.diffusion import NoiseLevels, SampleStreams
from calib_guidance.errors import ConfigurationError
from calib_guidance.guidance import ClassifierGuidance, Guidance, Guided, Plan
from calib_guidance.guidance.base import Decode, Guide, identity
from calib_guidance.samplers import Sampler, StepRecord
from calib_guidance.scores import Score
from calib_guidance.tasks import GuidedSampling

CONFIGURED = "configured"  # of a score or sampler that no named configuration describes
_BETA = 3.0  # β that the page starts with where the configuration does not smooth the classifier
_MOST = 10  # samples at first
_SMALL = 2e7  # parameters of models that a CPU samples within seconds


class Settings(NamedTuple):
    """Values of the page's controls. ``softplus_beta`` None does not smooth; ``classes`` are those of the samples."""

    score: str
    scale: float
    tau2: float
    softplus_beta: float | None
    sampler: str
    steps: int
    seed: int
    classes: tuple[int, ...]


class Trajectory(NamedTuple):
    """Samples and what the guiding classifier said of them at each step, from noise to image; NaN where it was not run."""

    images: np.ndarray  # uint8 (N, C, H, W)
    gradient_norm: np.ndarray  # (steps, N) ‖∇S‖
    confidence: np.ndarray  # (steps, N) probability of the sample's class


class Comparison(NamedTuple):
    """Both sides of the page. ``t`` ``(steps,)`` are steps of the full process, ``command`` samples the guided side."""

    unguided: Trajectory
    guided: Trajectory
    t: np.ndarray
    nfe: int
    seconds: float
    command: str


class _Resmoothed(Classifier):
    """A classifier that was smoothed at one β, at another; see :class:`~calib_guidance.classifiers.smoothing.Resmoothed`."""

    def __init__(self, classifier: Classifier, beta: float, other: float | None):
        super().__init__()
        self.classifier, self.num_classes, self._beta, self._other = classifier, classifier.num_classes, beta, other

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        with Resmoothed(self._beta, self._other):
            return self.classifier(x, t)


class _SecondHalf(Guidance):
    """Guides the second half of a batch, and only looks at the first: one pass for both sides.

    Args:
        guidance: what guides.
        guides: whether it does; without, it looks at both halves.
    """

    def __init__(self, guidance: ClassifierGuidance, guides: bool):
        super().__init__()
        self.guidance, self.guides = guidance, guides

    def parts(self) -> Sequence[Guidance]:
        return self.guidance.parts()

    def plan(self, levels: NoiseLevels) -> Plan:
        return self.guidance.plan(levels)

    def prepare(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide:
        guide, first = self.guidance.prepare(levels, y, decode), len(y) // 2 if self.guides else len(y)

        def half(predict: Predict, x_t: Tensor, i: int) -> Guided:
            plain: list[Prediction] = []

            def once(x: Tensor, level: int) -> Prediction:
                plain.append(predict(x, level))
                return plain[-1]

            guided = guide(once, x_t, i)
            if guided.prediction is not None:  # which holds the shift of cfg_residual
                pairs = zip(plain[0].detach(), guided.prediction, strict=True)
                guided = guided._replace(prediction=Prediction(*(_joined(a, b, first) for a, b in pairs)))
            if guided.score is not None:
                zero = torch.zeros_like(guided.score)
                guided = guided._replace(score=_joined(zero, guided.score, first))
            return guided

        return half


def _joined(a: Tensor | None, b: Tensor | None, first: int) -> Tensor | None:
    """The first samples of one tensor and the others of another."""
    return b if a is None or b is None or a is b else torch.cat([a[:first], b[first:]])


class _Watch:
    """An observer that keeps gradient norm and confidence of every step, the last time where a step is repeated."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, record: StepRecord) -> None:
        aux, missing = record.guided.aux, np.full(len(record.y), np.nan)
        norm = missing if aux.gradient is None else aux.gradient.flatten(1).norm(dim=1).cpu().numpy()
        confidence = missing
        if aux.logits is not None:
            confidence = aux.logits.float().softmax(1).gather(1, record.y[:, None])[:, 0].cpu().numpy()
        self.steps[record.i] = norm, confidence

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        norm, confidence = zip(*(self.steps[i] for i in sorted(self.steps, reverse=True)), strict=True)
        return np.stack(norm), np.stack(confidence)


def _class_of(node: Mapping[str, Any], module: Any) -> type:
    """The class that ``class_path`` names; short names are those of a module."""
    path = node["class_path"]
    return pkgutil.resolve_name(path) if "." in path else getattr(module, path)


def _make(node: Mapping[str, Any], module: Any) -> Any:
    """The object that ``class_path`` and ``init_args`` describe."""
    arguments = node.get("init_args") or {}
    parts = {k: _make(v, module) if isinstance(v, dict) and "class_path" in v else v for k, v in arguments.items()}
    return _class_of(node, module)(**parts)


def _arguments(node: Mapping[str, Any], module: Any, but: Sequence[str]) -> dict[str, Any]:
    """All options of a part, stated or default, ``but`` what the page sets itself; nested parts as their class and options."""
    kind, found = _class_of(node, module), {}
    for base in reversed(kind.__mro__[:-1]):
        found |= {name: p.default for name, p in inspect.signature(base.__init__).parameters.items()}
    found |= node.get("init_args") or {}
    kept = {name: value for name, value in found.items() if name not in ("self", "args", "kwargs", "options", *but)}
    nested = {k: _arguments(v, module, but) for k, v in kept.items() if isinstance(v, dict) and "class_path" in v}
    return kept | nested | {"class_path": kind}


def _count_option(node: Mapping[str, Any], module: Any) -> str:
    """Name of a sampler's option for its number of steps."""
    return "num_steps" if "num_steps" in _arguments(node, module, ()) else "steps"


def _named(kind: str, but: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The named configurations of ``score`` or ``sampler``: class_path and init_args by name."""
    names = [name for name in configuration_names() if name.startswith(f"{kind}/")]
    parts = {name.partition("/")[2]: read_yaml(shipped(f"lightning_configs/{name}.yaml"))["model"] for name in names}
    return {
        name: part["guidance"]["score"] if kind == "score" else part["sampler"]
        for name, part in parts.items()
        if name not in but
    }


def _off_the_shelf(node: object) -> Iterator[Namespace]:
    """Options of every OffTheShelfClassifier below a node of the parsed configuration."""
    if isinstance(node, list):
        for each in node:
            yield from _off_the_shelf(each)
    elif isinstance(node, Namespace):
        if str(node.get("class_path")).rpartition(".")[2] == "OffTheShelfClassifier":
            yield node.init_args
        for each in vars(node).values():
            yield from _off_the_shelf(each)


class Session:
    """The model of a configuration, and what the page can change of it.

    Attributes:
        settings: those of the configuration, with which the page starts.
        scores, samplers: by name, as ``class_path`` and ``init_args``.
        class_names: by number.
        smooths: whether the classifier has activations to smooth.
        is_quick: whether a comparison is expected to take seconds.
    """

    def __init__(self, module: GuidedSampling, options: Namespace, argv: Sequence[str], beta: float | None, used: bool):
        guidance = module.guidance
        if type(guidance) is not ClassifierGuidance:
            kind = "none" if guidance is None else type(guidance).__name__
            raise ConfigurationError(
                f"the app shows ClassifierGuidance, and the configuration's guidance is {kind}: add one, such as "
                "--config guidance/algorithm1 with a classifier"
            )
        self.denoiser, self.guidance, self.argv = module.denoiser, guidance, list(argv)
        self._beta, self.smooths = beta or 0.0, beta is not None
        self._classifier, self._schedule = guidance.classifier, guidance.schedule
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(self.device)
        arguments = options.model.init_args
        score = arguments.guidance.init_args.get("score")
        sampler = arguments.sampler.as_dict()
        # At τ2 = 1, which the page sets, tempered is plain.
        self.scores, score_name = self._choices(
            _named("score", but=["plain"]),
            score.as_dict() if score else {"class_path": "TemperedLogProb", "init_args": {"tau1": 1.0}},
            scores,
            ["tau2"],
        )
        self.samplers, sampler_name = self._choices(_named("sampler"), sampler, samplers, ["steps", "num_steps"])
        data = options.data.init_args if options.get("data") else Namespace()
        count = module.num_classes or data.get("num_classes")
        if count is None:
            raise ConfigurationError(
                "data.num_classes: neither the denoiser nor a classifier has classes: state how many"
            )
        stated = (
            data.get("class_names") or guidance.classifier.class_names or getattr(guidance.classifier, "prompts", None)
        )
        self.class_names = read_class_names(stated, count) or [str(number) for number in range(count)]
        tau2 = next((part.tau2 for part in guidance.score.modules() if hasattr(part, "tau2")), 1.0)
        self.settings = Settings(
            score_name,
            guidance.scale,
            tau2,
            beta if used else None,
            sampler_name,
            len(module.sampler.levels(self.denoiser).times),
            data.get("seed") or 0,
            tuple(range(min(count, _MOST))),
        )
        parameters = sum(parameter.numel() for parameter in module.parameters())
        self.is_quick = self.device.type == "cuda" or parameters < _SMALL

    @staticmethod
    def _choices(named: dict[str, Any], own: dict[str, Any], module: Any, but: list[str]) -> tuple[dict[str, Any], str]:
        """What can be chosen, and the configuration's own choice."""
        mine = _arguments(own, module, but)
        found = next((name for name, node in named.items() if _arguments(node, module, but) == mine), None)
        return ({CONFIGURED: own} if found is None else {}) | named, found or CONFIGURED

    def sampler(self, settings: Settings) -> Sampler:
        """The sampler of these settings."""
        node = self.samplers[settings.sampler]
        steps = {_count_option(node, samplers): settings.steps}
        return _make({**node, "init_args": (node.get("init_args") or {}) | steps}, samplers)

    def score(self, settings: Settings) -> Score:
        """The score of these settings. One that tilts over groups takes all samples of the page as its group."""
        node = self.scores[settings.score]
        if "group_size" in (node.get("init_args") or {}):
            node = {**node, "init_args": node["init_args"] | {"group_size": len(settings.classes)}}
        score = _make(node, scores)
        for part in score.modules():
            if hasattr(part, "tau2"):
                part.tau2 = settings.tau2
        return score

    def compare(self, settings: Settings, progress: Callable[[int, int], None] | None = None) -> Comparison:
        """Sample the same noise unguided and guided.

        Args:
            settings: of the guided side; the unguided one has sampler, steps, seed and classes in common with it.
            progress: called with the number of finished steps and of all steps.
        """
        if not settings.classes:
            raise ValueError("no class is chosen: choose at least one")
        sampler, guidance, count = self.sampler(settings), self.guidance, len(settings.classes)
        guidance.score, guidance.schedule = self.score(settings), copy.copy(self._schedule)
        guidance.scale, guidance.classifier = settings.scale or 1.0, self._classifier
        if self.smooths and settings.softplus_beta != self._beta:
            guidance.classifier = _Resmoothed(self._classifier, self._beta, settings.softplus_beta)
        if not sampler.takes_score:
            guidance.schedule.gamma = 0.0  # only DDPM has the sine factor
        sampler.check(self.denoiser, guidance)
        started, watch = time.monotonic(), _Watch()
        noise = SampleStreams([settings.seed] * 2 * count, [*range(count)] * 2, self.denoiser.image_shape, self.device)
        y = torch.tensor(settings.classes * 2, device=self.device)
        with eager():
            x0 = sampler(self.denoiser, noise, y, _SecondHalf(guidance, settings.scale != 0), [watch], progress)
            with torch.no_grad():
                images = to_uint8(self.denoiser.decode(x0)).cpu().numpy()
        norm, confidence = watch.stacked()
        sides = (Trajectory(images[k], norm[:, k], confidence[:, k]) for k in (slice(count), slice(count, None)))
        t = sampler.levels(self.denoiser).times[::-1]
        seconds = time.monotonic() - started
        return Comparison(*sides, t, sampler.nfe(self.denoiser), seconds, self.command(settings))

    def command(self, settings: Settings) -> str:
        """The command that samples the guided side: the configuration's, with what differs from it."""
        first, words = self.settings, ["calib-guidance", "predict", *self.argv]
        changed = {name for name in Settings._fields if getattr(settings, name) != getattr(first, name)}
        inside = "score." if self.scores[settings.score].get("init_args", {}).get("group_size") else ""
        if "score" in changed:
            words += ["--config", f"score/{settings.score}"]
        if "sampler" in changed:
            words += ["--config", f"sampler/{settings.sampler}"]
        options = {}
        if changed & {"score", "tau2"}:
            options[f"model.guidance.score.{inside}tau2"] = f"{settings.tau2:g}"
        if inside and len(settings.classes) != 10:
            options["model.guidance.score.group_size"] = str(len(settings.classes))
        if "scale" in changed:
            options["model.guidance.scale"] = f"{settings.scale:g}"
        if "softplus_beta" in changed:
            beta = settings.softplus_beta
            options["model.guidance.classifier.softplus_beta"] = "null" if beta is None else f"{beta:g}"
        if changed & {"sampler", "steps"}:
            option = _count_option(self.samplers[settings.sampler], samplers)
            options[f"model.sampler.{option}"] = str(settings.steps)
        if "sampler" in changed and self._schedule.gamma and not self.sampler(settings).takes_score:
            options["model.guidance.schedule.gamma"] = "0"
        if "seed" in changed:
            options["data.seed"] = str(settings.seed)
        if options:
            options["trainer.default_root_dir"] = f"outputs/app-{zlib.crc32(repr(settings).encode()):08x}"
        return shlex.join([*words, *(word for name, value in options.items() for word in (f"--{name}", value))])


def open_session(argv: Sequence[str]) -> Session:
    """The session of a configuration; ``argv`` is that of ``predict``."""
    set_threads(1)
    with quietly(logging.WARNING):
        cli = run_lightning(["predict", *argv], ParsedCLI)
        if cli.trains:
            kind = cli.options.model.class_path.rpartition(".")[2]
            raise ConfigurationError(f"the app samples, and the configuration's model is {kind}: name one of predict")
        options = copy.deepcopy(cli.options)
        found = list(_off_the_shelf(options.model.init_args.get("guidance")))
        stated = next((each.softplus_beta for each in found if each.softplus_beta is not None), None)
        beta = stated or _BETA
        for each in found:
            each.softplus_beta = beta
        try:
            module = cli.build("model", options.model)
        except ValueError:
            if stated is not None or not found:
                raise
            beta, module = (
                None,
                cli.build("model", cli.options.model),
            )  # nothing to smooth in it, or something else is wrong
    if not isinstance(module, GuidedSampling):
        raise ConfigurationError(
            f"the app shows GuidedSampling, and the configuration's model is {type(module).__name__}"
        )
    return Session(module.eval(), cli.options, argv, beta if found else None, stated is not None)
