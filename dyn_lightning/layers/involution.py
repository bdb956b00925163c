"""Involution: Inverting the Inherence of Convolution for Visual Recognition (Li et al., CVPR 2021),
arXiv 2103.06255.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import (
    BatchNorm2d,
    add_bias,
    conv2d_arguments,
    conv2d_repr,
    copy_bias_,
    in_format_of,
    under_kernels,
    with_kernel_size,
)
from dyn_lightning.per_sample.geometry import padding_in_numbers


class Involution2d(nn.Module):
    """Multiply each pixel's neighbourhood with a kernel made from that pixel, shared by the channels of a group.

    ``y[c, p] = sum_u kernel[c // group_channels, u, p] x[c, s p + d u]``, ``kernel = span(ReLU(BN(reduce(x))))``, where
    x is averaged over the stride first. On sizes that the stride does not divide the last average is over fewer pixels.
    ``bias`` is added to the output. Training holds the kernels and their gradients, kH kW / group_channels maps each,
    and a few maps of x; it never unfolds x.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output, as many as ``in_channels``.
        kernel_size: rows and columns of the kernels, odd (7 in the paper).
        stride: step of the kernels.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: distance of a kernel's elements.
        groups: 1; the channels that share a kernel are ``group_channels``.
        bias: whether there is a bias.
        reduction: r, the hidden layer that makes the kernels has ``in_channels / reduction`` channels, rounded down.
        group_channels: channels that share a kernel; divides ``in_channels``.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, H', W')`` as in ``nn.Conv2d``.

    Raises:
        ValueError: C_in other than C_out, groups other than 1, an even kernel, group_channels that do not divide the
            channels, a reduction above them, a count below 1, an unknown padding.

    Example:
        >>> Involution2d(32, 32, 7, stride=2, padding=3)(torch.randn(2, 32, 15, 13)).shape
        torch.Size([2, 32, 8, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        reduction: int = 4,
        group_channels: int = 16,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_count("reduction", reduction)
        check_count("group_channels", group_channels)
        if in_channels != out_channels:
            raise ValueError(
                f"in_channels={in_channels} must be out_channels={out_channels}, since involution cannot change them: "
                "put a 1x1 convolution before it, or leave the layer static"
            )
        if groups != 1:
            raise ValueError(f"groups={groups} must be 1: say how channels share kernels by group_channels")
        if in_channels % group_channels:
            raise ValueError(
                f"group_channels={group_channels} must divide in_channels={in_channels}: take fewer (or 1)"
            )
        if in_channels < reduction:
            raise ValueError(f"reduction={reduction} must be at most in_channels={in_channels}: take a smaller one")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        if not all(length % 2 for length in self.kernel_size):
            raise ValueError(
                f"kernel_size={self.kernel_size} must be odd, to have a pixel in the middle: take one more"
            )
        self.reduction, self.group_channels = reduction, group_channels
        hidden = in_channels // reduction
        self.reduce = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.norm = BatchNorm2d(hidden)
        self.span = nn.Conv2d(hidden, math.prod(self.kernel_size) * in_channels // group_channels, 1)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Involve ``(B, C, H, W)``."""
        check_batched(x.shape)
        pixels = under_kernels(x, self.kernel_size, self.padding, self.dilation)
        pixels = F.avg_pool2d(pixels, self.stride, ceil_mode=True) if self.stride != (1, 1) else pixels
        kernels = self.span(torch.relu(self.norm(self.reduce(pixels))))
        y = involve(x, kernels, self.kernel_size, self.stride, self.padding, self.dilation)
        return in_format_of(x, add_bias(y, self.bias))

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        kernel_size: int | Pair | None = None,
        reduction: int = 4,
        group_channels: int = 16,
    ) -> "Involution2d":
        """Build the layer from a trained convolution; the output is not the same: there are no fixed kernels to take.

        Groups of the convolution are of no account; the bias is kept, and the size of the output.

        Args:
            conv: the trained convolution.
            kernel_size: of the involution; None is the convolution's.
            reduction: r.
            group_channels: channels that share a kernel.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        arguments = conv2d_arguments(conv) | {"groups": 1}
        if kernel_size is not None:
            arguments = with_kernel_size(arguments, kernel_size)
        layer = cls(**arguments, reduction=reduction, group_channels=group_channels).to(conv.weight)
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, reduction={self.reduction}, group_channels={self.group_channels}"


def involve(x: Tensor, kernels: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair) -> Tensor:
    """Multiply each neighbourhood of ``x`` ``(B, C, H, W)`` with its kernel, ``(B, G kH kW, H', W')``.

    The kernel's elements are taken one after the other, in the backward pass too: an unfolded map would be kH kW times
    as large as the map.
    """
    zeros, (rows, columns) = padding_in_numbers(x.shape, padding, kernel_size, (1, 1), dilation)
    x = F.pad(x, zeros) if zeros else x
    x = F.pad(x, (columns, columns, rows, rows)).to(kernels.dtype)
    kernels = kernels.unflatten(1, (-1, 1, math.prod(kernel_size)))
    x = x.unflatten(1, (kernels.shape[1], -1))
    # A compiler fuses the plain form, and its backward pass, better than what is written out here.
    multiply = _multiply if torch.compiler.is_compiling() else _Multiply.apply
    return multiply(x, kernels, kernel_size, stride, dilation).flatten(1, 2)


class _Multiply(torch.autograd.Function):
    """``_multiply``, with a backward pass that adds up the gradient of x in place."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _multiply(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, kernels) = grads, ctx.saved_tensors
        x_grad = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        kernels_grad = torch.empty_like(kernels)
        neighbours = [_neighbours(one, grad.shape, *ctx.geometry) for one in (x, x_grad)]
        for element, (pixels, pixels_grad) in enumerate(zip(*neighbours, strict=True)):
            pixels_grad.addcmul_(kernels[:, :, :, element], grad)
            kernels_grad[:, :, :, element] = (grad * pixels).sum(2, keepdim=True)
        return x_grad.to(x.dtype), kernels_grad, None, None, None


def _multiply(x: Tensor, kernels: Tensor, *geometry: Pair) -> Tensor:
    """Multiply ``(B, G, C / G, H, W)`` with ``(B, G, 1, kH kW, H', W')``."""
    wide = torch.promote_types(x.dtype, torch.float32)  # 16 bits would lose what is added last
    y = x.new_zeros(*x.shape[:3], *kernels.shape[4:], dtype=wide)
    for element, pixels in enumerate(_neighbours(x, y.shape, *geometry)):
        y.addcmul_(kernels[:, :, :, element], pixels)
    return y.to(x.dtype)


def _neighbours(x: Tensor, shape: torch.Size, kernel_size: Pair, stride: Pair, dilation: Pair) -> Iterator[Tensor]:
    """Give for each element of the kernels the pixels that it is multiplied with, as views of ``x``."""
    for i, j in product(*map(range, kernel_size)):
        rows, columns = x[..., i * dilation[0] :: stride[0], :], slice(j * dilation[1], None, stride[1])
        yield rows[..., columns][..., : shape[3], : shape[4]]
