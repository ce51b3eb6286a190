"""What the work of a run takes: memory and operations by counting, on no memory at all."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from calib_guidance.samplers.base import start
from calib_guidance.tasks import DenoiseImages, GuidedSampling

Trial = Callable[[L.LightningModule, int], dict[str, Tensor]]


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return known[0] if known else math.inf


class Counter(TorchDispatchMode):
    """Operations (a multiplication with its addition is two), and the most bytes in tensors that are alive at once.

    Tensors are counted as they are made, on the meta device, too. What a kernel takes for itself while it works is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known = torch.utils.weak.WeakIdKeyDictionary()

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.is_mkldnn:  # packed weights show no storage
                continue
            if (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result


def weights_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


class Work(NamedTuple):
    """What a run does over and over.

    Attributes:
        name: for people.
        times: how often for one batch.
        do: does it once, for so many samples; tensors to look at by name.
    """

    name: str
    times: float
    do: Trial


def sampling_work(module: GuidedSampling) -> list[Work]:
    """Steps with and without a classifier, and the decoder."""
    levels, guidance = module.sampler.levels(module.denoiser), module.guidance
    active = [False] * len(levels.times) if guidance is None else guidance.active(levels)
    total = module.sampler.num_evaluations(module.denoiser) / module.denoiser.evaluations
    made: dict[str, Tensor] = {}  # of the step, for the decoder after it

    def step(guided: bool) -> Trial:
        # Half signal, half noise: where mistakes in weights, ε and v show most.
        rows = [i for i, on in enumerate(active) if on == guided]
        i = min(rows, key=lambda i: abs(levels.alphas_cumprod[i] - 0.5), default=None)

        def do(module: L.LightningModule, count: int) -> dict[str, Tensor]:
            y = torch.zeros(count, dtype=torch.long, device=module.device)
            predict, guide = start(module.denoiser, module.guidance, levels, y, clip=True)
            noise = torch.randn(count, *module.denoiser.image_shape, device=module.device)
            with torch.no_grad():
                found = guide(predict, noise * math.sqrt(1 - levels.alphas_cumprod[i]), i)
            made["x̂0"] = found.prediction.x0
            named = made | {"logits": found.logits, "gradient": found.step_gradient}
            return {name: value for name, value in named.items() if value is not None}

        return do

    def decode(module: L.LightningModule, count: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"image": module.denoiser.decode(made.pop("x̂0"))}

    share = sum(active) / len(active)
    works = [("guided step", total * share, True), ("step", total * (1 - share), False)]
    return [*(Work(name, times, step(on)) for name, times, on in works if times), Work("decoding", 1, decode)]


def batch_work(module: L.LightningModule, batch: dict[str, Tensor]) -> list[Work]:
    """A training step with its optimizer's, or denoising a batch."""

    def repeated(count: int, device: torch.device) -> dict[str, Tensor]:
        return {k: v[torch.arange(count) % len(v)].to(device) for k, v in batch.items()}

    def denoise(module: L.LightningModule, count: int) -> dict[str, Tensor]:
        image, _ = module.input_transform(repeated(count, module.device))
        return {"image": image}

    def train(module: L.LightningModule, count: int) -> dict[str, Tensor]:
        found = module.configure_optimizers()
        optimizer = found["optimizer"] if isinstance(found, dict) else found
        loss = module.training_step(repeated(count, module.device), 0)
        loss.backward()
        gradients = [p.grad.detach().flatten() for p in module.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach(), "gradient norms": torch.stack([g.norm() for g in gradients])}

    if isinstance(module, DenoiseImages):
        return [Work("denoised batch", 1, denoise)]
    return [Work("training step", 1, train)]


def count_cost(works: Sequence[Work], twin: L.LightningModule, count: int) -> tuple[float, int]:
    """Operations and the most bytes beside the weights that a batch takes, counted on a twin on the meta device."""
    operations, peak = 0.0, 0
    for work in works:
        with Counter() as counter:
            work.do(twin, count)
        operations, peak = operations + work.times * counter.operations, max(peak, counter.peak)
    return operations, peak
