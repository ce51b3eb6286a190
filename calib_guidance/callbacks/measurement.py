"""Measurements of a sampling run, what is kept of them with each shard, and the metrics of the written samples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.backend.images import Uint8Rule, to_uint8
from calib_guidance.classifiers import Classifier
from calib_guidance.data.base import ImageSource, Row
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.data.imagenet import read_class_names
from calib_guidance.evaluation import FeatureExtractor
from calib_guidance.evaluation.metrics import select
from calib_guidance.evaluation.quality import Quality, write_arrays
from calib_guidance.evaluation.spec import Measures
from calib_guidance.evaluation.statistics import ReferenceStatistics
from calib_guidance.runs import RunFolder
from calib_guidance.runs.context import SamplingContext
from calib_guidance.runs.identity import settings_digest

_FEWEST_BLOCKS, _MOST_BLOCKS = 5, 50  # of shards, for standard deviations; so many are in memory


class Measurement(L.Callback):
    """Base class of callbacks with results, which :class:`~calib_guidance.callbacks.RunReport` collects at the end.

    Results cover the complete folder, however many runs and workers made it. What cannot be measured from the written samples is
    kept as sums, or as rows of single samples: :class:`~calib_guidance.callbacks.SampleWriter` stores those of a shard with it,
    and at the end each measurement is given those of all shards.
    """

    context: SamplingContext

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            pl_module.check()  # nothing of an earlier run is touched for a configuration that cannot run
            self.context = pl_module.context
            self.context.measure(self)
            self.begin(trainer, pl_module)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set up for a run whose parts fit together."""

    def finished(self, images: Tensor, labels: Tensor) -> None:
        """Samples that are about to be written: ``(N, C, H, W)`` in [-1, 1] and ``(N,)`` classes, on the device."""

    def sums(self) -> dict[str, Tensor]:
        """What is kept of the samples since :meth:`reset`: tensors that add up over samples, by name."""
        return {}

    def rows(self) -> dict[str, Tensor]:
        """What is kept of single samples since :meth:`reset`: tensors ``(k, …)`` to join over shards, or ``(0,)``, by name."""
        return {}

    def reset(self) -> None:
        """Forget all samples."""

    def load(self, kept: dict[str, Tensor]) -> None:
        """Take the sums and rows of all samples in place of those that were kept."""

    def load_blocks(self, sums: dict[str, Tensor]) -> None:
        """Take sums of G ≥ 5 blocks ``(G, …)``, which add up to those of an earlier :meth:`load`: for a standard error."""

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Metrics by name. Called on every rank, and may synchronize them; only rank 0's answer is used."""
        return {}

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        """Write plots of the results of all measurements, on rank 0 only."""
        return []


@torch.no_grad()
def decoded_shape(pl_module: L.LightningModule) -> tuple[int, ...]:
    """``(C, H, W)`` of the images of a run."""
    latent = torch.zeros(1, *pl_module.denoiser.image_shape, device=pl_module.device)
    return tuple(pl_module.denoiser.decode(latent).shape[1:])


def find_class_names(requests: Any, pl_module: L.LightningModule) -> list[str] | None:
    """Class names of the requests, else of the guiding classifier, or CLIP's prompts; else the numbers."""
    if (count := getattr(requests, "num_classes", None)) is None:
        return None
    guidance = getattr(pl_module, "guidance", None)
    parts = () if guidance is None else guidance.parts()
    guiding = [part.classifier for part in parts if hasattr(part, "classifier")]
    stated = [getattr(requests, "class_names", None), *(each.class_names for each in guiding)]
    prompts = next((each.prompts for each in guiding if hasattr(each, "prompts")), [])
    names = next(filter(None, stated), prompts if len(set(prompts)) == count else None)
    return read_class_names(names, count) or [str(number) for number in range(count)]


def title_of(label: int, names: Sequence[str] | None) -> str:
    """A class in a plot: its name, in which matplotlib sees no formula, or ``class 3``."""
    name = str(label) if names is None else names[label]
    return f"class {name}" if name == str(label) else name.replace("$", r"\$")


def kept_measurements(context: SamplingContext) -> dict[str, Measurement]:
    """Measurements that keep something, by class and settings: what two runs have under one name goes together."""
    callbacks = (context.configuration or {"trainer": {"callbacks": None}})["trainer"]["callbacks"] or []
    entries = [entry for entry in callbacks if "class_path" in entry]
    names: dict[str, Measurement] = {}
    for measurement in context.measurements:
        if not (measurement.sums() or measurement.rows()):
            continue
        kind = type(measurement).__name__
        entry = next((entry for entry in entries if entry["class_path"].rpartition(".")[2] == kind), {})
        if entry:
            entries.remove(entry)
        names[f"{kind}-{settings_digest(entry.get('init_args') or {})}"] = measurement
    return names


def load_kept(run: RunFolder, name: str, measurement: Measurement) -> bool:
    """Give a measurement what is kept of all shards under its name; False if some shard was made without it."""
    measurement.reset()
    shards, sums, rows = run.shards(), measurement.sums(), measurement.rows()
    blocks: list[dict[str, np.ndarray]] = [{} for _ in range(min(len(shards), _MOST_BLOCKS))]
    totals: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in rows}
    for number, shard in enumerate(shards):
        kept = run.read_sums(shard)
        kept = {key: kept[f"{name}.{key}"] for key in [*sums, *rows] if f"{name}.{key}" in kept}
        if len(kept) < len(sums) + len(rows) or any(kept[key].shape != sums[key].shape for key in sums):
            return False
        for added in (totals, blocks[number * len(blocks) // len(shards)]):
            added |= {key: added[key] + kept[key] if key in added else kept[key] for key in sums}
        for key in rows:
            parts[key].append(kept[key])
    # The shape of a row is not known where there are none.
    totals |= {key: np.concatenate([part for part in each if len(part)] or each[:1]) for key, each in parts.items()}
    measurement.load({key: torch.from_numpy(value) for key, value in totals.items()})
    if len(blocks) >= _FEWEST_BLOCKS:
        measurement.load_blocks({key: torch.from_numpy(np.stack([block[key] for block in blocks])) for key in sums})
    return True


class _DatasetImages(ImageSource):
    """Images of a data set of {image in [-1, 1], label}."""

    kind = "data set"

    def __init__(self, images: Dataset, uint8_rule: Uint8Rule):
        super().__init__(getattr(images, "name", type(images).__name__), len(images))
        self.images, self.uint8_rule, self.labelled = images, uint8_rule, "label" in images[0]

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        for block in blocks:
            items = [self.images[i] for i in block]
            images = [to_uint8(item["image"], self.uint8_rule).permute(1, 2, 0).cpu().numpy() for item in items]
            labels = [int(item.get("label", -1)) for item in items]
            yield [Row(f"image {i}", *row) for i, row in zip(block, zip(images, labels, strict=True), strict=True)]

    def provenance(self) -> dict[str, Any]:
        return {"uint8_rule": self.uint8_rule}


class SampleQuality(Measurement):
    """Fréchet distance, precision and recall against reference images; accuracy and ECE of an evaluation classifier.

    Measured on the written images of the complete run folder; ranks share them out. The evaluation classifier's prediction for
    each sample is in ``predictions.npz`` beside ``metrics.json``. ``calib-guidance evaluate`` measures the same way.

    Args:
        features: an extractor of :mod:`calib_guidance.evaluation.features`.
        reference: data set of {image in [-1, 1], label, index} that nothing was trained on, or a path: statistics that
            ``calib-guidance reference`` or another tool wrote, or images as it takes them.
        metrics: names of :data:`~calib_guidance.backend.choices.METRIC_OPTIONS`, or dotted paths of a
            :class:`~calib_guidance.evaluation.MetricSpec` of your own; those that the features, the reference or the number of
            samples do not allow are skipped with a note.
        eval_classifier: evaluation classifier; None uses that of :class:`~calib_guidance.evaluation.ClassifierFeatures`.
        k: neighbors for precision and recall.
        uint8_rule: of a reference that is a data set, see :func:`calib_guidance.backend.images.to_uint8`.
        batch_size: images at a time.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Dataset | str,
        metrics: Sequence[str] = ("fid", "pr", "classifier"),
        eval_classifier: Classifier | None = None,
        k: int = 3,
        uint8_rule: Uint8Rule = "truncate",
        batch_size: int = 250,
    ):
        self.features, self.reference, self.metrics = features, reference, tuple(metrics)
        self.uint8_rule, self.batch_size = uint8_rule, batch_size
        self.measures = Measures(features, eval_classifier, k=k)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        processes = DistributedContext(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        classifies = self.measures.classifier is not None
        specs = select((name for name in self.metrics if classifies or name != "classifier"), self.features)
        source = self.reference
        if not isinstance(source, str):
            source = ImageSet(_DatasetImages(source, self.uint8_rule), max_corrupt=0.0)
        reference, shape = ReferenceStatistics.open(source), decoded_shape(pl_module)
        reference.check_shape("the run", shape)
        self.quality = Quality(specs, self.measures, reference, self.batch_size, processes, [shape])

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        folder = self.context.store.extended()
        if not any(folder.record(shard)["rows"] for shard in folder.shards()):
            return {"notes": ["quality not measured: all samples failed"]}
        results = self.quality.measure(ImageSet(folder.path))
        # Folders are moved, and the same samples measure the same wherever they lie.
        results["provenance"]["samples"]["source"] = "this run"
        if trainer.is_global_zero:
            write_arrays(folder.path, self.quality)
        return results
