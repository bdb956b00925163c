"""The methods of the per-sample convolution: ways to compute ``(sum_k routing_k weight_k) * x`` that differ in speed,
in memory and in what they can be exported to, not in value.

Axis letters: b sample, k kernel, g group, o output channel, i input channel of a group, h w kernel rows and columns,
y x output rows and columns, p position (y and x as one axis).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.convolution import convolve, is_convolved_singly
from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_output, is_channels_last
from dyn_lightning.per_sample.operation import operation
from dyn_lightning.per_sample.processor import is_intel
from dyn_lightning.per_sample.tracing import in_export, is_one

# Where the output has no more positions than this, the mixture multiplies unfolded inputs with the K kernels; a
# convolution pays for laying out kernels that are used so few times, a product for columns whose numbers lie apart.
FEW_POSITIONS = 4


def mix_kernels(routing: Tensor, weight: Tensor) -> Tensor:
    """Mix K kernels by each sample's routing weights: ``(B, K)`` and ``(K, ...)`` give ``(B, ...)``."""
    return torch.mm(routing, weight.flatten(1)).view(-1, *weight.shape[1:])


def multiply_each(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve sample b of ``(B, C_in, H, W)`` with ``kernels[b]``: a matrix product with the unfolded sample, for each
    group, or of numbers with each pixel, where a channel has one weight.
    """
    batch, out_channels = kernels.shape[:2]
    if math.prod(kernels.shape[1:]) == geometry.groups:  # `torch.bmm` takes longer, in bfloat16 ten times as long
        return seen_by_one(input, geometry) * kernels.squeeze(2)
    patches, products = unfolded(input, kernels.shape[3:], geometry), batch * geometry.groups
    matrices = kernels.reshape(products, out_channels // geometry.groups, -1)
    patches = patches.reshape(products, matrices.shape[2], -1)
    size = positions(input.shape, kernels.shape, geometry)
    return torch.bmm(matrices, side_by_side(patches)).view(batch, out_channels, *size)


def grouped(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix the kernels and put the batch into the groups of one convolution: the usual form."""
    other = not (input.is_contiguous() or torch.compiler.is_compiling())
    # Mixed in channels_last, of a copy of all K, which pays where it is used often.
    if other and len(input) >= len(weight) and is_convolved_singly(input, weight.shape[1:], geometry):
        kernels = mix_kernels(routing, weight.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)
        return convolve(input, kernels.flatten(0, 1), geometry)
    kernels = torch.mm(routing, weight.flatten(1)).view(-1, *weight.shape[2:])  # a view less than `mix_kernels`' two
    return convolve(input, kernels, geometry)


def matmul(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix the kernels and multiply them with the unfolded input."""
    if not multiplies(weight.shape, geometry):
        return multiply_each(input, mix_kernels(routing, weight), geometry)
    if is_channels_last(input):
        # The gradients of mixed kernels that are transposed afterwards would be copied.
        if torch.is_grad_enabled() and (routing.requires_grad or weight.requires_grad):
            kernels = mix_kernels(routing, weight.flatten(2).mT)
        else:
            kernels = mix_kernels(routing, weight).flatten(2).mT
        return torch.bmm(input.flatten(2).mT, kernels).unflatten(1, input.shape[2:]).permute(0, 3, 1, 2)
    kernels = torch.mm(routing, weight.flatten(1)).view(-1, *weight.shape[1:3])
    return torch.bmm(kernels, side_by_side(input.flatten(2))).view(*kernels.shape[:2], *input.shape[2:])


def mixture(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve with all K kernels and mix the outputs."""
    kernels, out_channels = weight.shape[:2]
    size = positions(input.shape, weight.shape, geometry)
    if mixes_rows(weight.shape, geometry, math.prod(size)):
        patches, matrix = unfolded(input, weight.shape[3:], geometry), weight.flatten(0, 1).flatten(1)
        if is_one(patches.shape[0]) and not is_channels_last(input):
            products = (matrix @ side_by_side(patches).flatten(0, 1)).view(kernels, -1)
            return (routing.to(products.dtype) @ products).view(1, out_channels, *size)
        rows = patches.mT
        products = (rows.flatten(0, 1) @ matrix.mT).unflatten(1, (kernels, out_channels))
        shares = routing.repeat_interleave(rows.shape[1], 0).to(products.dtype)
        return (shares[:, None] @ products).view(rows.shape[0], *size, out_channels).permute(0, 3, 1, 2)
    # F.conv2d wants a group's output channels side by side: (k, g o) -> (g, k, o).
    stacked = weight.unflatten(1, (geometry.groups, -1)).transpose(0, 1).flatten(0, 2)
    outputs = F.conv2d(input, stacked, None, *geometry).unflatten(1, (geometry.groups, kernels, -1))
    return torch.einsum("bk,bgkoyx->bgoyx", routing.to(outputs.dtype), outputs).flatten(1, 2)


Method = Callable[..., Tensor]  # of input, routing, weight and geometry


def multiplies(weight: tuple[int, ...], geometry: Geometry) -> bool:
    """Tell whether a sample's convolution is one matrix product with the sample as it lies in memory."""
    plain = geometry.stride == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    return weight[-2:] == (1, 1) and plain


def mixes_rows(weight: tuple[int, ...], geometry: Geometry, positions: int) -> bool:
    """Tell whether the mixture multiplies (unfolded) pixels with the K kernels."""
    return multiplies(weight, geometry) or (geometry.groups == 1 and positions <= FEW_POSITIONS)


def side_by_side(patches: Tensor) -> Tensor:
    """Give ``(b, i, p)``, if the columns are few so that the numbers of each lie side by side: on a CPU that is not
    Intel's, products then take a half to a quarter of the time.
    """
    count = patches.shape[2]  # may be open in an export, and is a tensor to a tracer
    few = patches.is_cpu and not in_export() and type(count) is int and are_few(count, is_intel())
    return patches.mT.contiguous().mT if few else patches


def are_few(columns: int, intel: bool) -> bool:
    """Tell whether a product with so many columns is to have them ``side_by_side``."""
    return not intel and 1 < columns <= FEW_POSITIONS


def unfolded(input: Tensor, kernel_size: torch.Size, geometry: Geometry) -> Tensor:
    """Lay out what each position sees as a column: ``(B, C_in kH kW, P)``."""
    if tuple(kernel_size) != (1, 1):
        return F.unfold(input, tuple(kernel_size), geometry.dilation, geometry.padding, geometry.stride)
    return seen_by_one(input, geometry).flatten(2)


def seen_by_one(input: Tensor, geometry: Geometry) -> Tensor:
    """Give the pixels that 1x1 kernels see: ``(B, C_in, H', W')``."""
    rows, columns = geometry.padding
    input = F.pad(input, (columns, columns, rows, rows)) if any(geometry.padding) else input
    if geometry.stride != (1, 1):
        input = input[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    return input


def mixing_operation(name: str, forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]]) -> Any:
    """Register a method that computes its gradients itself, as ``operation`` says, of input, routing and weight."""
    return operation(
        name,
        ("input", "routing", "weight"),
        forward,
        backward,
        grouped,
        lambda input, routing, weight, geometry: empty_output(input, weight.shape[1], weight, geometry),
        _multiply_adds,
    )


def _multiply_adds(input: torch.Size, routing: torch.Size, weight: torch.Size, geometry: Geometry) -> tuple[int, int]:
    mixed = input[0] * math.prod(weight[1:])
    return mixed * weight[0], mixed * math.prod(positions(input, weight, geometry))
