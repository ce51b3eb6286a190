"""Convolutions whose weights stay as they are, in the layout that the CPU's kernels want."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from calib_guidance.backend import tuning

# Operators of oneDNN, which torch.compile puts in the place of convolutions when it freezes weights.
_ops = torch.ops.mkldnn
_PLAIN = ("none", [], "")  # no activation fused


if torch.backends.mkldnn.is_available():  # builds without oneDNN do not have the operators

    @register_flop_formula(_ops._convolution_pointwise)
    def _operations(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return 2 * out_shape[0] * out_shape[2] * out_shape[3] * torch.Size(weight).numel()

    @register_flop_formula(_ops._convolution_transpose_pointwise)
    def _operations_transposed(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[2] * x[3] * torch.Size(weight).numel()


class _Convolve(torch.autograd.Function):
    """The convolution, and as its gradient with respect to the image the transposed one."""

    @staticmethod
    def forward(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return _ops._convolution_pointwise(
            x, conv.packed(x.shape), conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, *_PLAIN
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, nn.Conv2d], output: Tensor) -> None:
        ctx.conv, ctx.shape = inputs[1], inputs[0].shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        conv, weight = ctx.conv, ctx.conv.packed(ctx.shape, backward=True)
        unused = [rest for _, rest in conv.strides(ctx.shape)]
        return _ops._convolution_transpose_pointwise(
            gradient, weight, None, conv.padding, unused, conv.stride, conv.dilation, conv.groups, *_PLAIN
        ), None


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps its weights packed for the CPU, once for the image and once for its gradient.

    What cannot be packed (another device, half precision, autocast, weights that learn) is convolved as ever. The gradient cannot
    be differentiated again. Copies and files hold the plain weights alone. Weights that change are packed again, except for
    changes that PyTorch does not notice (``weight.data``).
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, with the same parameters (not copies)."""
        packed = cls.__new__(cls)
        packed.__dict__ = dict(conv.__dict__, _parameters=dict(conv._parameters), _packed={})
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _packed={})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to another device or number format, and packs again after it."""
        self._packed = {}
        return super()._apply(fn, recurse)

    def can_pack(self, x: Tensor) -> bool:
        return (
            tuning.enabled()
            and x.device.type == "cpu"
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and len(x) > 0
            and min(self.strides(x.shape)) >= (0, 0)
            and x.dtype == self.weight.dtype == torch.float32
            and not self.weight.requires_grad
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def strides(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Along each side of an input of ``shape``: strides that fit, and pixels at the end that no stride reaches."""
        sides = zip(shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return [divmod(s + 2 * p - d * (k - 1) - 1, stride) for s, p, d, k, stride in sides]

    def packed(self, shape: Sequence[int], backward: bool = False) -> Tensor:
        """The weights, packed for the first ``shape`` of inputs; for others oneDNN rearranges them again where it must."""
        made_of = (self.weight.data_ptr(), None if self.weight.is_inference() else self.weight._version)
        if self._packed.get("made of") != made_of:
            self._packed = {"made of": made_of}
        if backward not in self._packed:
            weight, settings = self.weight.detach().contiguous(), (self.stride, self.dilation, self.groups)
            if backward:
                strides, unused = zip(*self.strides(shape), strict=True)
                out = [shape[0], self.out_channels, *(number + 1 for number in strides)]
                self._packed[backward] = _ops._reorder_convolution_transpose_weight(
                    weight, self.padding, unused, *settings, out
                )
            else:
                self._packed[backward] = _ops._reorder_convolution_weight(weight, self.padding, *settings, list(shape))
        return self._packed[backward]

    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self) if self.can_pack(x) else super().forward(x)


def pack_convolutions(network: nn.Module) -> None:
    """Put :class:`PackedConv2d` in the place of a frozen network's convolutions.

    In eager mode oneDNN rearranges the weights at every call: for two images of 64×64, ResNet-50 spends twice as long on that as
    on convolving.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(module, name, PackedConv2d.of(child))
