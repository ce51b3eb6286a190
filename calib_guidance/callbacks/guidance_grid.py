"""One noise under several scores and scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from calib_guidance.backend.atomic import atomic_write
from calib_guidance.backend.images import to_uint8
from calib_guidance.callbacks.measurement import Measurement, find_class_names, title_of
from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion import SampleStreams
from calib_guidance.errors import ConfigurationError, check_numbers
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.plots import guidance_grid
from calib_guidance.samplers import Sampler
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, Score, TemperedLogProb


def _usual() -> dict[str, Score]:
    """Plain and tempered log-probability, and the regularized scores, as the named configurations have them."""
    divergences = {name: DivergenceRegularized(name, tau2=0.8) for name in ("js", "fkl")}
    entropy = EntropyRegularized(0.1, "confidence", tau2=0.8)
    return {"plain": TemperedLogProb(), "tempered": TemperedLogProb(tau2=0.8), "entropy": entropy, **divergences}


class _EachItsOwn(Score):
    """Several scores, for blocks of a batch."""

    def __init__(self, scores: Sequence[Score], sizes: Sequence[int]):
        super().__init__()
        self.scores, self.sizes = torch.nn.ModuleList(scores), list(sizes)

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        blocks = zip(self.scores, logits.split(self.sizes), y.split(self.sizes), strict=True)
        return torch.cat([score(f, label, time) for score, f, label in blocks])


@contextlib.contextmanager
def _changed(guidance: ClassifierGuidance, **values: Any) -> Iterator[None]:
    """A guidance with other score and scale for a while."""
    before = {name: getattr(guidance, name) for name in values}
    try:
        for name, value in values.items():
            setattr(guidance, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(guidance, name, value)


def _group(index: int, score: Score) -> range:
    """The samples that a score looks at together with one."""
    first = index - index % score.group_size
    return range(first, first + score.group_size)


def sample_grid_of(
    denoiser: Denoiser,
    sampler: Sampler,
    guidance: ClassifierGuidance,
    scores: Sequence[Score],
    scales: Sequence[float],
    index: int,
    label_of: Callable[[int], int],
    seed: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008, which is a constant
) -> Tensor:
    """Sample ``index`` under each score and scale, uint8 ``(scores, scales, C, H, W)``; all scores of a scale in one batch.

    Args:
        label_of: class of a sample by its index, that of ``index`` and those that a score tilts over with it.
    """
    groups = [_group(index, score) for score in scores]
    rows = [i for group in groups for i in group]
    places = np.cumsum([0, *map(len, groups[:-1])]) + [index - group.start for group in groups]
    y, made = torch.tensor([label_of(i) for i in rows], device=device), []
    for scale in scales:
        noise = SampleStreams([seed] * len(rows), rows, denoiser.image_shape, device)
        with _changed(guidance, score=_EachItsOwn(scores, [len(group) for group in groups]), scale=scale):
            x0 = sampler(denoiser, noise, y, guidance)
        with torch.no_grad():
            made.append(to_uint8(denoiser.decode(x0[torch.as_tensor(places, device=x0.device)])))
    return torch.stack(made, 1).cpu()


class GuidanceGrid(Measurement):
    """Grid of score × scale from the noise of one sample: ``plots/guidance_grid.png``, and images of all loggers.

    It is sampled once the run is complete, with the sampler, classifier and schedule of the run, and takes as long as
    ``len(scales)`` batches of ``len(scores)`` samples. ``guidance_grid.npz`` in the folder of the run holds ``image`` uint8
    ``(scores, scales, C, H, W)``, ``score``, ``scale``, ``index`` and ``label``.

    Args:
        scores: rows by name; None takes plain, tempered, entropy, js and fkl, as the named configurations have them.
        scales: columns; 0 is unguided.
        index: sample of the run whose noise and class are taken.
    """

    def __init__(
        self,
        scores: dict[str, Score] | None = None,
        scales: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 4.0),
        index: int = 0,
    ):
        self.scores = scores or _usual()
        for scale in scales:
            check_numbers(scale=scale)
        if not scales or index < 0:
            raise ConfigurationError(
                f"scales must name at least one, and index be at least 0, got {scales} and {index}"
            )
        self.scales, self.index = [float(scale) for scale in scales], index

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.requests, self.names = trainer.datamodule, find_class_names(trainer.datamodule, pl_module)
        if type(pl_module.guidance) is not ClassifierGuidance:
            kind = "none" if pl_module.guidance is None else type(pl_module.guidance).__name__
            raise ConfigurationError(
                f"GuidanceGrid varies the score and scale of ClassifierGuidance, got {kind}: remove it"
            )
        last = max(_group(self.index, score).stop for score in self.scores.values()) - 1
        if last >= len(self.requests):
            raise ConfigurationError(
                f"GuidanceGrid needs samples up to {last}, those that a score tilts over included, and the run has "
                f"{len(self.requests)}: set index lower, or data.num_samples higher"
            )

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        if not trainer.is_global_zero:
            return {}
        module, request = trainer.lightning_module, self.requests[self.index]
        self.images = sample_grid_of(
            module.denoiser,
            module.sampler,
            module.guidance,
            [score.to(module.device) for score in self.scores.values()],
            self.scales,
            self.index,
            lambda i: self.requests[i]["label"],
            request["seed"],
            module.device,
        ).numpy()
        self.label = request["label"]
        columns = {"score": np.array([*self.scores]), "scale": np.array(self.scales)}
        columns |= {"image": self.images, "index": np.array(self.index), "label": np.array(self.label)}
        with atomic_write(self.context.store.path / "guidance_grid.npz") as file:
            np.savez_compressed(file, **columns)
        return {}

    def draw(self, results: Mapping[str, Any], folder: Path) -> list[Path]:
        if not hasattr(self, "images"):
            return []
        title = title_of(self.label, self.names)
        return guidance_grid(self.images, [*self.scores], self.scales, folder / "guidance_grid", title)
