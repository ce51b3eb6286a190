"""A denoiser with some of its self-attention changed, for negatives that share its weights."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.denoisers.negatives.base import Negative, PredictAlone, PredictPair, doubled
from calib_guidance.diffusion.schedules import NoiseLevels

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def named_module(denoiser: nn.Module, name: str) -> nn.Module:
    """The one module of this name, or whose name ends in it."""
    names = [n for n, _ in denoiser.named_modules() if n == name or n.endswith(f".{name}")]
    if len(names) != 1:
        first, *rest = name.split(".")
        near = [n for n, _ in denoiser.named_modules() if n.split(".")[-1 - len(rest) :][0] == first]
        raise ValueError(
            f"{name!r} must be the name of one module of the denoiser, or its end, and {len(names)} have it; its modules "
            f"include {', '.join(near) or ', '.join(n for n, _ in denoiser.named_children())}"
        )
    return denoiser.get_submodule(names[0])


class _Intercept(TorchFunctionMode):
    """Self-attention of the last of ``parts`` equal parts of a batch by another function."""

    def __init__(self, attend: Attend, parts: int, calls: list[Any]):
        super().__init__()
        self.attend, self.parts, self.calls = attend, parts, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention or args[0].shape[-2] != args[1].shape[-2]:
            return result
        self.calls.append(func)
        query, key, value = (tensor.chunk(self.parts)[-1] for tensor in args[:3])
        return torch.cat([*result.chunk(self.parts)[:-1], self.attend(query, key, value)])


class _Changed(nn.Module):
    """A module whose self-attention is changed for the last of ``parts`` equal parts of its batch."""

    def __init__(self, module: nn.Module, attend: Attend, parts: int):
        super().__init__()
        self.module, self.attend, self.parts = module, attend, parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls: list[Any] = []
        with _Intercept(self.attend, self.parts, calls):
            result = self.module(*args, **kwargs)
        if not calls:
            raise ValueError(
                f"layers: a {type(self.module).__name__} without self-attention (scaled_dot_product_attention): name blocks that "
                "have it"
            )
        return result


def with_changed_attention(denoiser: Denoiser, layers: Sequence[str], attend: Attend, parts: int = 2) -> Denoiser:
    """A copy of the denoiser, of the same weights, whose layers attend by ``attend`` in the last of ``parts`` of a batch."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    changed = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    for layer in layers:
        module = named_module(changed, layer)
        (name,) = (name for name, other in changed.named_modules() if other is module)
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, _Changed(module, attend, parts))
    return changed


class AttentionNegative(Negative):
    """The denoiser with the self-attention of some layers changed, in the second half of a doubled batch.

    Works on every network whose attention is :func:`torch.nn.functional.scaled_dot_product_attention`, with and without labels,
    and on compiled ones.

    Args:
        layers: names of the blocks or attention modules, as in ``denoiser.named_modules()`` or their ends: ``middle_block.1`` of
            ADM and EDM, ``dec.8x8_in0`` of EDM2, ``transformer_blocks.13`` of DiT and SiT, ``mid_block`` of diffusers' UNets.
    """

    def __init__(self, layers: Sequence[str]):
        super().__init__()
        if isinstance(layers, str) or not layers:
            raise ValueError(f"layers must be a list of one or more names of modules, got {layers!r}")
        self.layers = list(layers)
        self._copies: dict[int, tuple[list[object], Denoiser]] = {}

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.nfe != 1:
            raise ValueError(
                f"{type(self).__name__} changes the network of a single model, and a {type(denoiser).__name__} of NFE "
                f"{denoiser.nfe} makes several predictions: name both negatives in TwoNegatives"
            )
        for layer in self.layers:
            named_module(denoiser, layer)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The changed attention of ``(N, heads, tokens, channels)`` each."""

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        return doubled(self._changed(denoiser).prepare(levels, torch.cat([y, y])))

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        predict = self._changed(denoiser, parts=1).prepare(levels, y)
        return lambda x_t, i, cond: predict(x_t, i)

    def _changed(self, denoiser: Denoiser, parts: int = 2) -> Denoiser:
        """The changed copy: kept while it is one, as a compiled network would have to be compiled again."""
        made_of = [denoiser, *denoiser.parameters(), *denoiser.buffers()]
        # The number formats are those of the moment, which a retry in float32 changes.
        made_of += [v for m in denoiser.modules() for v in vars(m).values() if isinstance(v, torch.dtype)]
        before, copy = self._copies.get(parts, ([], None))
        if copy is None or [*map(id, before)] != [*map(id, made_of)]:
            copy = with_changed_attention(denoiser, self.layers, self.attend, parts)
            self._copies[parts] = made_of, copy
        return copy
