"""The gradient of depthwise kernels on a CPU, where torch's own is slow.

oneDNN, which computes torch's convolutions there, has a fast one for kernels of up to 3 columns, if the output has more
rows than there are rows of zeros around the input. Elsewhere, for 5x5 kernels and for 3x3 kernels on 2x2 maps, it
unfolds each channel, which takes 2 to 8 times as long. Here kernels are taken apart into some of up to 3 columns, each
with the part of the padded input that it sees.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.tracing import in_export, is_transformed

MOST_COLUMNS = 3
# Torch's takes as long as so many numbers of the unfolded input do, besides these, for each channel. For fewer than the
# least in all, to take kernels apart takes longer.
NUMBERS_A_CHANNEL, LEAST_NUMBERS = 500, 1 << 20


def convolve(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve as ``F.conv2d`` does, where its gradient is slow with a gradient of our own."""
    trained = kernels.requires_grad and torch.is_grad_enabled() and not (is_transformed() or in_export())
    if trained and has_slow_gradient(input.shape, kernels.shape, geometry, input.device.type):
        return _Convolution.apply(input, kernels, geometry)
    return F.conv2d(input, kernels, None, *geometry)


def has_slow_gradient(input: tuple[int, ...], kernels: tuple[int, ...], geometry: Geometry, device: str) -> bool:
    """Tell whether torch's gradient of kernels is slower than ours, from the shapes that ``kernels_gradient`` takes."""
    channels, depth, height, width = kernels
    if channels != geometry.groups or depth > 1 or geometry.dilation != (1, 1) or device != "cpu":
        return False
    if width <= MOST_COLUMNS and not _has_many_zeros(input, kernels, geometry):
        return False
    places = math.prod(positions(input, kernels, geometry))
    return channels * (places * height * width + NUMBERS_A_CHANNEL) >= LEAST_NUMBERS


def kernels_gradient(grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of depthwise kernels without dilation.

    Args:
        grad: ``(1, C, H', W')``, of the output.
        input: ``(1, C, H, W)``.
        kernels: ``(C, 1, kH, kW)``.
        geometry: of the convolution, whose groups are C.

    Returns:
        The shape of the kernels.
    """
    (above, left), (down, right), size = geometry.padding, geometry.stride, input.shape[2:]
    if _has_many_zeros(input.shape, kernels.shape, geometry):
        below = (grad.shape[2] - 1) * down + kernels.shape[2] - above - size[0]
        input, above = F.pad(input, (0, 0, above, below)), 0
    settings = (None, geometry.stride, (above, 0), (1, 1), False, (0, 0), geometry.groups, (False, True, False))
    found, first = [], -left
    for part in kernels.tensor_split(math.ceil(kernels.shape[3] / MOST_COLUMNS), 3):
        last = first + (grad.shape[3] - 1) * right + part.shape[3]
        if last <= 0 or first >= size[1]:
            found.append(torch.zeros_like(part))
        else:
            seen = F.pad(input, (-first, last - size[1]))
            found.append(torch.ops.aten.convolution_backward(grad, seen, part, *settings)[1])
        first += part.shape[3]
    return torch.cat(found, 3)


def _has_many_zeros(input: tuple[int, ...], kernels: tuple[int, ...], geometry: Geometry) -> bool:
    """Tell whether there are as many rows of zeros, above and below the input, as there are rows of the output."""
    rows, _ = positions(input, kernels, geometry)
    above = geometry.padding[0]
    below = (rows - 1) * geometry.stride[0] + kernels[2] - above - input[2]
    return rows <= above + max(0, below)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, kernels)
        ctx.geometry = geometry
        return F.conv2d(input, kernels, None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # by operations that have gradients themselves
        input, kernels = ctx.saved_tensors
        input_grad = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.geometry
            settings = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
            input_grad = torch.ops.aten.convolution_backward(grad, input, kernels, *settings)[0]
        return input_grad, kernels_gradient(grad, input, kernels, ctx.geometry), None
