"""What a GPU would launch and hold, counted on a CPU: kernels of a step, graphs, and peak memory.

    python benchmarks/gpu_path.py                # two or three minutes of compiling

Operators are those that eager PyTorch launches at a step. Kernels are what the compiler (inductor, for the CPU; that for GPUs
fuses much the same) generates in their place, beside calls of libraries: convolutions, matrix products, attention. With CUDA
graphs a step launches one graph. Memory is predicted on the meta device, without weights; against it stands the most that the
allocator held on the CPU, the kernels' own buffers included.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from calib_guidance.backend.cost import WorkCounter
from calib_guidance.backend.counters import PeakMemory
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.networks import DiT, EDM2UNet, LightningDiT, SmallResNet, UNet

NARROW = {"model_channels": 64, "num_res_blocks": 1, "num_classes": 10, "num_head_channels": 32}
NARROW |= {"use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": (2,), "channel_mult": (1, 2)}
TOKENS = {"sample_size": 16, "hidden_size": 128, "depth": 4, "num_heads": 4, "num_classes": 10}


class Part(NamedTuple):
    """A network, and what a step does with it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of its input
    gradient: bool = False


PARTS = {
    "ADM, 64 channels": Part(lambda: UNet(32, 3, out_channels=6, **NARROW), (4, 3, 32, 32)),
    "EDM2, 64 channels": Part(
        lambda: EDM2UNet(32, 3, 10, 64, channel_mult=(1, 2), num_blocks=1).fold(), (4, 3, 32, 32)
    ),
    "DiT, 4 blocks": Part(lambda: DiT(**TOKENS), (4, 4, 16, 16)),
    "LightningDiT, 4 blocks": Part(lambda: LightningDiT(in_channels=4, patch_size=2, **TOKENS), (4, 4, 16, 16)),
    "ResNet, gradient": Part(
        lambda: OffTheShelfClassifier(SmallResNet(10, 3, (64, 128), 2), 10), (4, 3, 32, 32), gradient=True
    ),
}


def prepare(part: Part, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The function of one step, to be compiled or not, and its input."""
    with torch.device(device):
        network = part.make().eval().requires_grad_(False)
        x = torch.randn(part.shape)
    if part.gradient:
        return network.freeze().forward, x
    with torch.no_grad(), torch.device(device):
        emb = network.embed_time(torch.zeros(len(x))) + network.embed_labels(torch.zeros(len(x), dtype=torch.long))
    return lambda x: network.decode(x, emb), x


def step(part: Part, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a step does: a forward pass, or the gradient of the first logit."""
    if not part.gradient:
        with torch.no_grad():
            return function(x)
    source = x.detach().requires_grad_()
    return torch.autograd.grad(function(source)[:, 0].sum(), source)[0]


def operators(part: Part) -> tuple[int, float]:
    """Operators of a step, and bytes at its peak, on the meta device."""
    function, x = prepare(part, "meta")
    with WorkCounter() as counter:
        step(part, function, x)
    with PeakMemory() as memory:
        step(part, function, x)
    return len(counter.works), memory.peak


def _events(tree: Any) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


def allocated(part: Part) -> float:
    """Bytes at the peak of a step that PyTorch's allocator has given out, beyond those before it."""
    function, x = prepare(part, "cpu")
    step(part, function, x)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
        step(part, function, x)
    now = peak = 0
    events = [e for e in _events(profiler.profiler.kineto_results.experimental_event_tree()) if e.name == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_time_ns):
        now += event.typed[1].alloc_size
        peak = max(peak, now)
    return peak


def compiled(part: Part) -> tuple[int, int, int, int]:
    """Graphs, graph breaks, generated kernels and calls of libraries, of the compiled step."""
    torch._dynamo.reset()
    metrics.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    function, x = prepare(part, "cpu")
    if part.gradient:
        function.__self__.network = function.__self__.network.to(memory_format=torch.channels_last)
    fast = torch.compile(function, dynamic=False)
    _, codes = run_and_get_code(lambda: step(part, fast, x))
    calls = sum(len(re.findall(r"= (?:extern_kernels|torch\.ops\.\w+)\.\w+", code)) for code in codes)
    calls += sum(len(re.findall(r"^\s+extern_kernels\.\w+\(", code, re.MULTILINE)) for code in codes)
    breaks = sum(counters["graph_break"].values())
    return counters["stats"]["unique_graphs"], breaks, metrics.generated_kernel_count, calls


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    arguments.add_argument("--no-compile", action="store_true", help="count operators and memory alone")
    options = arguments.parse_args()
    print(
        "| step | operators | graphs | graph breaks | kernels | library calls | peak predicted, MiB | allocated, MiB |"
    )
    print("|---|" + "---:|" * 7)
    for name in options.parts:
        count, predicted = operators(PARTS[name])
        found = ("–",) * 4 if options.no_compile else compiled(PARTS[name])
        sizes = f"{predicted / 2**20:.1f} | {allocated(PARTS[name]) / 2**20:.1f}"
        print(f"| {name} | {count} | {' | '.join(map(str, found))} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
