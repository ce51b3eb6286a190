"""The page of configuration keys: every option of every class that a YAML file can name, from its signature and docstring."""

from __future__ import annotations

import importlib
import inspect
import re

from docstrings import arguments, as_markdown
from jsonargparse._parameter_resolvers import get_signature_parameters
from reference import public

# Heading, where its class_path stands, package and base classes.
PARTS = (
    ("Tasks", "model", "tasks", ()),
    ("Denoisers", "model.denoiser", "denoisers", ("Denoiser",)),
    ("Combination rules", "model.denoiser.rule", "denoisers", ("Rule",)),
    ("Negatives", "model.denoiser.negative", "denoisers", ("Negative",)),
    ("Samplers", "model.sampler", "samplers", ("Sampler",)),
    ("Guidance", "model.guidance", "guidance", ("Guidance",)),
    (
        "Guidance schedule and stabilizer",
        "model.guidance.schedule, model.guidance.stabilizer",
        "guidance",
        ("GuidanceSchedule", "GradientStabilizer"),
    ),
    ("Scores", "model.guidance.score", "scores", ("Score",)),
    ("Classifiers", "model.guidance.classifier, model.classifier", "classifiers", ("Classifier",)),
    (
        "Decoders for the classifier",
        "model.guidance.decoder",
        "denoisers",
        ("LinearDecoder", "TinyDecoder", "VAEDecoder"),
    ),
    ("Networks", "model.denoiser.network, model.network", "networks", ()),
    ("Training inputs", "model.input_transform", "training", ("InputTransform",)),
    ("Learning-rate schedules", "model.lr_scheduler", "training", ("WarmupCosine",)),
    ("Data", "data", "data", ("LightningDataModule",)),
    ("Callbacks", "trainer.callbacks", "callbacks", ("Callback",)),
    ("Feature extractors", "trainer.callbacks.SampleQuality.features", "evaluation", ("FeatureExtractor",)),
)


def _classes(package: str, bases: tuple[str, ...]) -> list[type]:
    module = importlib.import_module(f"calib_guidance.{package}")
    kinds = [each for name in public(package) if inspect.isclass(each := getattr(module, name))]
    kinds = [each for each in kinds if not inspect.isabstract(each) and not issubclass(each, tuple)]
    if not bases:
        return kinds
    return [each for each in kinds if {parent.__name__ for parent in each.__mro__} & set(bases)]


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("{", "&#123;").replace("<", "&lt;")


def _type(annotation: object) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    if "Callable[" in str(annotation):
        return "callable"
    text = inspect.formatannotation(annotation) if not isinstance(annotation, str) else annotation
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    return re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | ").replace("'", ""), text)


def _section(kind: type) -> str:
    first = as_markdown(inspect.getdoc(kind) or "").split("\n\n")[0]
    told: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        told |= arguments(inspect.cleandoc(parent.__doc__ or ""))
    rows = []
    for parameter in get_signature_parameters(kind, None):
        value = getattr(parameter.default, "__name__", parameter.default)
        default = "required" if parameter.default is inspect.Parameter.empty else f"`{_cell(value)}`"
        about = told.get(parameter.name) or as_markdown(parameter.doc or "")
        rows.append(f"| `{parameter.name}` | {_cell(_type(parameter.annotation))} | {default} | {_cell(about)} |")
    table = (
        "\n".join(["| key | type | default | what it sets |", "|---|---|---|---|", *rows]) if rows else "No options."
    )
    link = f"api/{kind.__module__.split('.')[1]}.md"
    return f"### {kind.__name__}\n\n{first} [API]({link})\n\n{table}\n"


def page() -> str:
    parts = [
        "# Configuration keys\n\nEvery option of every class that a configuration can name, from its signature. "
        "`class_path` takes the class name alone; options stand below `init_args`, and on the command line below the key of "
        "the section: `--model.guidance.scale 2`. `calib-guidance predict --config digits --print_config=comments` prints "
        "the keys of one configuration, with those of Lightning's `trainer`.\n"
    ]
    for title, key, package, bases in PARTS:
        keys = ", ".join(f"`{each}`" for each in key.split(", "))
        parts += [f"## {title}\n\nSet at {keys}.\n", *map(_section, _classes(package, bases))]
    return "\n".join(parts)
