"""The gradient of depthwise kernels on a CPU, where torch's own is slow.

oneDNN, which computes torch's convolutions there, has a fast one for kernels of up to 3 columns, if the output has more
rows than there are rows of zeros around the input. Elsewhere, for 5x5 kernels and for 3x3 kernels on 2x2 maps, it
unfolds each channel, which takes 2 to 8 times as long. Here kernels are taken apart into pieces of up to 3 columns,
each with the part of the padded input that it sees.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.tracing import in_export, is_transformed, remembered

HAS_ONEDNN = torch.backends.mkldnn.is_available()
MOST_COLUMNS = 3
# oneDNN has no float64 and no complex numbers; torch computes these channel by channel, each piece anew.
MOST_BYTES = 4
# The time of torch's gradient grows as the numbers of the unfolded input and this many for each channel do. Below the
# least in all, to take kernels apart costs more than it saves.
NUMBERS_A_CHANNEL, LEAST_NUMBERS = 500, 1 << 20


def convolve(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve as ``F.conv2d`` does, where its gradient is slow with a gradient of our own."""
    trained = kernels.requires_grad and torch.is_grad_enabled() and not (torch.compiler.is_compiling() and in_export())
    if trained and _is_slow(input, kernels, geometry) and not is_transformed():
        return _Convolution.apply(input, kernels, geometry)
    return F.conv2d(input, kernels, None, *geometry)


def has_slow_gradient(
    input: tuple[int, ...], kernels: tuple[int, ...], geometry: Geometry, bytes_each: int, device: str
) -> bool:
    """Tell whether torch's gradient of kernels is slower than ours, from the shapes that ``gradients`` takes."""
    channels, depth, height, width = kernels
    if channels != geometry.groups or depth > 1 or geometry.dilation != (1, 1):
        return False
    if device != "cpu" or bytes_each > MOST_BYTES or not HAS_ONEDNN:
        return False
    if width <= MOST_COLUMNS and not _has_many_zeros(input, kernels, geometry):
        return False
    places = math.prod(positions(input, kernels, geometry))
    return channels * (places * height * width + NUMBERS_A_CHANNEL) >= LEAST_NUMBERS


def padded_numbers(
    input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, bytes_each: int, device: str
) -> int:
    """Count the numbers of a sample's padded input that a piece sees, of ``(B, C_in, H, W)`` and the K kernels.

    Returns:
        0 where torch's gradient is taken.
    """
    stride, padding, dilation, groups = geometry
    samples, out_channels, *kernel = input[0], *weight[1:]
    together = Geometry(stride, padding, dilation, samples * groups)
    shapes = (1, samples * input[1], *input[2:]), (samples * out_channels, *kernel)
    if not has_slow_gradient(*shapes, together, bytes_each, device):
        return 0
    rows, columns = positions(input, weight, geometry)
    height = (rows - 1) * stride[0] + weight[3] if _has_many_zeros(*shapes, geometry) else input[2]
    return input[1] * height * ((columns - 1) * stride[1] + min(weight[4], MOST_COLUMNS))


def gradients(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute a convolution's gradients, that of kernels in our own way where torch's is slow.

    Args:
        grad: ``(1, C_out, H', W')``, of the output.
        input: ``(1, C_in, H, W)``.
        kernels: ``(C_out, C_in / groups, kH, kW)``.
        geometry: of the convolution.
        wanted: whether the gradient of the input is wanted, and that of the kernels.

    Returns:
        What is wanted, in the shapes of input and kernels.
    """
    stride, padding, dilation, groups = geometry
    settings = (None, stride, padding, dilation, False, (0, 0), groups)
    apart = wanted[1] and _is_slow(input, kernels, geometry)
    kernels_grad = _by_pieces(grad, input, kernels, geometry) if apart else None
    if apart and not wanted[0]:
        return None, kernels_grad
    mask = (wanted[0], wanted[1] and not apart, False)
    input_grad, whole, _ = torch.ops.aten.convolution_backward(grad, input, kernels, *settings, mask)
    return input_grad, kernels_grad if apart else whole


def _by_pieces(grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of depthwise kernels without dilation."""
    (above, left), (down, right), size = geometry.padding, geometry.stride, input.shape[2:]
    by_hand = (0, 0)  # rows of zeros, above and below
    if _has_many_zeros(input.shape, kernels.shape, geometry):
        by_hand = above, (grad.shape[2] - 1) * down + kernels.shape[2] - above - size[0]
        above = 0
    settings = (None, geometry.stride, (above, 0), (1, 1), False, (0, 0), geometry.groups, (False, True, False))
    found, first = [], -left
    for piece in kernels.tensor_split(-(-kernels.shape[3] // MOST_COLUMNS), 3):
        last = first + (grad.shape[3] - 1) * right + piece.shape[3]
        if last <= 0 or first >= size[1] or size[0] + by_hand[1] <= 0:  # it sees zeros alone
            found.append(torch.zeros_like(piece))
        else:
            seen = F.pad(input, (-first, last - size[1], *by_hand))
            found.append(torch.ops.aten.convolution_backward(grad, seen, piece, *settings)[1])
            del seen  # before the next one is made
        first += piece.shape[3]
    return torch.cat(found, 3) if len(found) > 1 else found[0]


def _is_slow(input: Tensor, kernels: Tensor, geometry: Geometry) -> bool:
    find = has_slow_gradient if torch.compiler.is_compiling() else _found
    return find(input.shape, kernels.shape, geometry, input.dtype.itemsize, input.device.type)


_found = remembered(has_slow_gradient)  # on small maps each call in Python would be seen


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
        return *gradients(grad, input, kernels, ctx.geometry, ctx.needs_input_grad[:2]), None
