"""Trained classifiers and diffusion models as repositories of the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from calib_guidance import classifiers, denoisers, networks
from calib_guidance.backend.text import read_yaml
from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.base import Denoiser
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.named import build_described

_PACKAGES = (classifiers, denoisers, networks)
_FILES = ("*.yaml", "*.json", "*.safetensors", "README.md")
# What ``fit`` writes, by task: the description and the weights.
_DESCRIPTIONS = ("classifier.yaml", "denoiser.yaml")
_USES = {
    Classifier: "Guide a diffusion model to a class: `classifier` of `calib_guidance.guidance.ClassifierGuidance`. It sees "
    "images in [-1, 1] of the kind that it was trained on (*Training input* above). Its confidence on "
    "other inputs is not calibrated.",
    Denoiser: "Sample images with the samplers of `calib_guidance.samplers`, with or without classifier guidance.",
}
_SEEN = {
    "CleanInput": "clean images",
    "NoisyInput": "noisy images x_t, with the step t",
    "DenoisedInput": "x̂0(x_t), denoised by a frozen diffusion model",
}


def _class_paths(node: object) -> Iterator[str]:
    """Every ``class_path`` of a description."""
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield str(node["class_path"])
        for value in node.values():
            yield from _class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_paths(value)


def _check_ours(description: object, where: Path) -> None:
    """Raise ConfigurationError for a class from outside this package: a downloaded file must not choose what code runs."""
    known = {name for package in _PACKAGES for name, value in vars(package).items() if isinstance(value, type)}
    for path in _class_paths(description):
        module, _, name = path.rpartition(".")
        if name not in known or (module and module.split(".")[0] != "calib_guidance"):
            raise ConfigurationError(
                f"{where} names the class {path}, which is not one of calib_guidance: build that model in your own code, and "
                "load its weights with `weights` or `checkpoint`"
            )
    if outside := [name for name in _weights_files(description) if Path(name).name != name]:
        raise ConfigurationError(
            f"{where} names weights outside of its folder: {outside[0]}; expected a file beside it"
        )


class HubModel(ModelHubMixin, library_name="calib_guidance", tags=["classifier-guidance", "diffusion"]):
    """A trained model with what describes it: ``push_to_hub``, ``save_pretrained`` and ``from_pretrained``.

    A saved folder has ``classifier.yaml`` or ``denoiser.yaml`` (what a ``predict`` configuration names), the weights as
    safetensors, ``config.json`` (the same description), and ``README.md``, the model card.

    ::

        model = HubModel.from_fit("outputs/digits_classifier")
        model.push_to_hub("me/digits-classifier")
        classifier = HubModel.from_pretrained("me/digits-classifier").module

    Args:
        folder: holds ``classifier.yaml`` or ``denoiser.yaml`` and the weights.
        module: the classifier or denoiser; None builds it from the folder.
        card: text of the model card; None keeps the folder's ``README.md``.
    """

    def __init__(self, folder: Path, module: nn.Module | None = None, card: str | None = None):
        found = [folder / name for name in _DESCRIPTIONS if (folder / name).is_file()]
        if not found:
            raise ConfigurationError(f"{folder} has no {' or '.join(_DESCRIPTIONS)}: expected a folder of HubModel")
        self.folder, self.description, self._card = folder, found[0], card
        if module is None:
            _check_ours(read_yaml(found[0]), found[0])
            module = build_described(read_yaml(found[0]), folder)
        self.module = module

    @classmethod
    def from_fit(cls, folder: str | Path) -> HubModel:
        """The model that ``calib-guidance fit`` wrote to ``folder``, with a card from its configuration and its last report.

        Raises:
            ConfigurationError: the folder has no exported model, or the model has classes from outside this package.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise ConfigurationError(
                f"{folder} has no config.yaml: expected the default_root_dir of calib-guidance fit"
            )
        configuration = read_yaml(folder / "config.yaml")
        if not (folder / "classifier.yaml").is_file():
            _describe_denoiser(folder, configuration)
        model = cls(folder)
        model._card = model_card(model.module, model.description.name, configuration, _last_report(folder))
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        description = read_yaml(self.description)
        for name in _weights_files(description):
            shutil.copyfile(self.folder / name, save_directory / name)
        shutil.copyfile(self.description, save_directory / self.description.name)
        (save_directory / "config.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        if Path(model_id).is_dir():
            return cls(Path(model_id))
        chosen = {name: options[name] for name in known if name in options}
        return cls(Path(snapshot_download(model_id, allow_patterns=list(_FILES), **chosen)))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, with the metadata of the Hub; ``license="mit"`` and the like go into the metadata."""
        text = self._card or (self.folder / "README.md").read_text()
        if text.startswith("---\n"):
            return ModelCard(text)
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict() | kwargs)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _weights_files(description: Mapping[str, Any]) -> list[str]:
    """The weights files beside a description."""
    options = description.get("init_args", {})
    return [str(options[name]) for name in ("weights", "checkpoint") if options.get(name)]


def _describe_denoiser(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Write ``denoiser.yaml`` beside the network that ``ExportWeights`` wrote."""
    task = configuration["model"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if task["class_path"].rpartition(".")[2] != "TrainDiffusion" or len(files) != 1:
        raise ConfigurationError(
            f"{folder} has neither a classifier.yaml, which ExportClassifier writes, nor one network of TrainDiffusion, which "
            "ExportWeights writes: add that callback to trainer.callbacks"
        )
    options = task["init_args"]
    settings = {name: options[name] for name in ("noise_schedule", "num_steps", "prediction")}
    network = options["network"]
    settings["class_conditional"] = network.get("init_args", {}).get("num_classes") is not None
    description = {"class_path": "ADMDenoiser", "init_args": {"network": network, "checkpoint": files[0]} | settings}
    text = "# `denoiser:` of a predict configuration.\n" + yaml.safe_dump(description, sort_keys=False)
    (folder / "denoiser.yaml").write_text(text)


def _last_report(folder: Path) -> dict[str, Any] | None:
    """The last report of ``CalibrationReport``, a test's before a validation's."""
    for stage in ("test", "val"):
        if reports := sorted((folder / "calibration").glob(f"{stage}-step*.json")):
            return json.loads(reports[-1].read_text()) | {"stage": stage}
    return None


def _name(description: object) -> str:
    """Class name of a part of a configuration."""
    return (
        str(description.get("class_path", "")).rpartition(".")[2]
        if isinstance(description, Mapping)
        else str(description)
    )


def model_card(
    module: nn.Module, description: str, configuration: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> str:
    """Text of a model card: model, data, training, calibration by noise level, intended use.

    Args:
        module: the classifier or denoiser.
        description: name of its YAML file.
        configuration: of the ``fit`` that trained it.
        report: of ``CalibrationReport``; None leaves out the section.
    """
    task, data = configuration["model"], configuration.get("data") or {}
    options, source = task.get("init_args", {}), data.get("init_args", {})
    kind = "classifier" if isinstance(module, Classifier) else "diffusion model"
    parameters = sum(parameter.numel() for parameter in module.parameters())
    facts = {
        "Class": f"`{type(module).__name__}`",
        "Network": f"`{type(module.network).__name__}`",
        "Parameters": f"{parameters:,}",
    }
    if getattr(module, "num_classes", None):
        facts["Classes"] = module.num_classes
    if isinstance(module, Classifier):
        facts["Temperature"] = module.temperature
        known = {name: getattr(module, name, None) for name in ("normalize", "resize")}
        facts |= {name.capitalize(): f"`{value}`" for name, value in known.items() if value is not None}
    else:
        facts["Image shape"] = "×".join(map(str, module.image_shape))
        facts |= {
            name: f"`{options[name]}`" for name in ("prediction", "noise_schedule", "num_steps") if name in options
        }
    training = {"Task": f"`{_name(task)}`", "Seed": configuration.get("seed_everything")}
    if "input_transform" in options:
        seen = _name(options["input_transform"])
        training["Training input"] = f"`{seen}`: {_SEEN.get(seen, 'see its class')}"
        weight = options.get("smooth_ece_weight")
        extra = (
            f" + {weight}·Smooth ECE ({options.get('smooth_ece_form')}, β = {options.get('smooth_ece_beta')})"
            if weight
            else ""
        )
        training["Objective"] = f"cross-entropy{extra}, label smoothing {options.get('label_smoothing', 0.0)}"
    training["Optimizer"] = f"`{_name(options.get('optimizer'))}`"
    trainer = configuration.get("trainer", {})
    training |= {
        name: trainer[name] for name in ("max_epochs", "max_steps", "precision") if trainer.get(name) not in (None, -1)
    }
    about = {"Data module": f"`{_name(data)}`"}
    about |= {
        name: f"`{source[name]}`"
        for name in ("source", "subset", "image_size", "train_split", "val_split")
        if source.get(name)
    }
    use = next(text for base, text in _USES.items() if isinstance(module, base))
    sections = [
        f"# {type(module.network).__name__} {kind}\n\nTrained with calib_guidance.",
        f"## Model\n\n{_table(facts)}",
        f"## Data\n\n{_table(about)}",
        f"## Training\n\n{_table(training)}",
        *([_evaluation(report)] if report else []),
        f"## Intended use\n\n{use} Not for decisions about people.",
        "## How to load it\n\n```python\nfrom calib_guidance.evaluation.hub_model import HubModel\n\n"
        'model = HubModel.from_pretrained("OWNER/NAME")\nmodel.module  # the model\nmodel.folder  # with '
        f"{description}, which a predict configuration names\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _evaluation(report: Mapping[str, Any]) -> str:
    """Accuracy, ECE and the other metrics of a report, overall and by noise level."""
    metrics = {name: value for name, value in report.items() if isinstance(value, Mapping) and "overall" in value}
    levels = [k for k, count in enumerate(report["count"]) if count]
    levels = levels if len(levels) > 1 else []
    head = ["metric", "all", *(f"t = {report['levels'][k].replace('-', '–')}" for k in levels)]
    rows = [
        [name, *(f"{number:.4f}" for number in (value["overall"], *(value["by_level"][k] for k in levels)))]
        for name, value in metrics.items()
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    data = "test" if report["stage"] == "test" else "validation"
    return f"## Evaluation\n\n{sum(report['count'])} {data} samples, by diffusion step t where there are several.\n\n{table}"
