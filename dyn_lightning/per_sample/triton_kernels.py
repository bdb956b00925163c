"""The per-sample convolution as Triton kernels for CUDA: kernels are mixed where they are used, and never stored.

Implicit matrix products, a tile of output channels times a tile of positions, a kernel element and a tile of input
channels at a time. In the forward pass and for the input's gradient, a tile of the mixed kernel is made in registers
from K tiles of the weight, which stays in the level 2 cache as all samples read it. The other gradients need the mixed
kernels' gradients, which are made, used for both and forgotten a tile and a sample at a time; they are added up in a
fixed order, so that results repeat.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyn_lightning.per_sample.case import TILE
from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_output
from dyn_lightning.per_sample.methods import mixing_operation

POSITIONS = 64  # of a tile, beside its channels


@triton.jit
def _mixed(weight, routing, b, k_count: tl.constexpr, offsets, mask, stride_k, wide: tl.constexpr):
    """Mix a tile of K kernels by the routing weights of sample b."""
    kernel = tl.zeros(offsets.shape, wide)
    for k in tl.static_range(k_count):
        share = tl.load(routing + b * k_count + k).to(wide)
        kernel += share * tl.load(weight + k * stride_k + offsets, mask=mask, other=0).to(wide)
    return kernel


@triton.jit
def _forward_kernel(
    x, routing, weight, y,
    groups, ins, outs, rows, columns, out_rows, out_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, kernel_rows, kernel_columns,
    k_count: tl.constexpr, tile: tl.constexpr, tile_p: tl.constexpr, wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(outs, tile)
    g = tl.program_id(2) // tiles
    o = (tl.program_id(2) % tiles) * tile + tl.arange(0, tile)
    p = tl.program_id(0) * tile_p + tl.arange(0, tile_p)
    total = tl.zeros((tile, tile_p), wide)
    taps = kernel_rows * kernel_columns
    for tap in range(taps):
        row = (p // out_columns) * stride_y - padding_y + (tap // kernel_columns) * dilation_y
        column = (p % out_columns) * stride_x - padding_x + (tap % kernel_columns) * dilation_x
        seen = (p < out_rows * out_columns) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        for first in range(0, ins, tile):
            i = first + tl.arange(0, tile)
            place = ((b * groups + g) * ins + i)[:, None] * (rows * columns) + (row * columns + column)[None, :]
            pixels = tl.load(x + place, mask=(i < ins)[:, None] & seen[None, :], other=0)
            offsets = ((tap * groups + g) * outs + o)[:, None] * ins + i[None, :]
            mask = (o < outs)[:, None] & (i < ins)[None, :]
            kernel = _mixed(weight, routing, b, k_count, offsets, mask, taps * groups * outs * ins, wide)
            total += tl.dot(kernel.to(pixels.dtype), pixels, input_precision=precision, out_dtype=wide)
    place = ((b * groups + g) * outs + o)[:, None] * (out_rows * out_columns) + p[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(o < outs)[:, None] & (p < out_rows * out_columns)[None, :])


@triton.jit
def _input_grad_kernel(
    grad, routing, weight, x_grad,
    groups, ins, outs, rows, columns, out_rows, out_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, kernel_rows, kernel_columns,
    k_count: tl.constexpr, tile: tl.constexpr, tile_p: tl.constexpr, wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(ins, tile)
    g = tl.program_id(2) // tiles
    i = (tl.program_id(2) % tiles) * tile + tl.arange(0, tile)
    p = tl.program_id(0) * tile_p + tl.arange(0, tile_p)
    total = tl.zeros((tile, tile_p), wide)
    taps = kernel_rows * kernel_columns
    for tap in range(taps):
        # The output position that saw pixel p through this element of the kernel, where there is one.
        up = p // columns + padding_y - (tap // kernel_columns) * dilation_y
        left = p % columns + padding_x - (tap % kernel_columns) * dilation_x
        row, column = up // stride_y, left // stride_x
        seen = (p < rows * columns) & (up >= 0) & (left >= 0) & (row < out_rows) & (column < out_columns)
        seen = seen & (up % stride_y == 0) & (left % stride_x == 0)
        for first in range(0, outs, tile):
            o = first + tl.arange(0, tile)
            place = ((b * groups + g) * outs + o)[:, None] * (out_rows * out_columns) + (row * out_columns + column)[
                None
            ]
            grads = tl.load(grad + place, mask=(o < outs)[:, None] & seen[None, :], other=0)
            offsets = ((tap * groups + g) * outs + o)[None, :] * ins + i[:, None]
            mask = (o < outs)[None, :] & (i < ins)[:, None]
            kernel = _mixed(weight, routing, b, k_count, offsets, mask, taps * groups * outs * ins, wide)
            total += tl.dot(kernel.to(grads.dtype), grads, input_precision=precision, out_dtype=wide)
    place = ((b * groups + g) * ins + i)[:, None] * (rows * columns) + p[None, :]
    mask = (i < ins)[:, None] & (p < rows * columns)[None, :]
    tl.store(x_grad + place, total.to(x_grad.dtype.element_ty), mask=mask)


@triton.jit
def _kernel_grads_kernel(
    grad, x, routing, weight, weight_grad, routing_grads,
    batch, groups, ins, outs, rows, columns, out_rows, out_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, kernel_rows, kernel_columns,
    k_count: tl.constexpr, k_tile: tl.constexpr, tile: tl.constexpr, tile_p: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(0)
    tiles = tl.cdiv(outs, tile)
    g = tl.program_id(1) // tiles
    o = (tl.program_id(1) % tiles) * tile + tl.arange(0, tile)
    i = tl.program_id(2) * tile + tl.arange(0, tile)
    k = tl.arange(0, k_tile)
    stride_k = kernel_rows * kernel_columns * groups * outs * ins
    inside = (o < outs)[:, None] & (i < ins)[None, :]
    offsets = k[:, None, None] * stride_k + (((tap * groups + g) * outs + o)[:, None] * ins + i[None, :])[None, :, :]
    mask = (k < k_count)[:, None, None] & inside[None, :, :]
    kernels = tl.load(weight + offsets, mask=mask, other=0).to(wide)
    total = tl.zeros((k_tile, tile, tile), wide)
    program = (tap * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    for b in range(batch):
        one = tl.zeros((tile, tile), wide)
        for first in range(0, out_rows * out_columns, tile_p):
            p = first + tl.arange(0, tile_p)
            there = p < out_rows * out_columns
            place = ((b * groups + g).to(tl.int64) * outs + o)[:, None] * (out_rows * out_columns) + p[None, :]
            grads = tl.load(grad + place, mask=(o < outs)[:, None] & there[None, :], other=0)
            row = (p // out_columns) * stride_y - padding_y + (tap // kernel_columns) * dilation_y
            column = (p % out_columns) * stride_x - padding_x + (tap % kernel_columns) * dilation_x
            seen = there & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            place = ((b * groups + g).to(tl.int64) * ins + i)[None, :] * (rows * columns)
            place += (row * columns + column)[:, None]
            pixels = tl.load(x + place, mask=(i < ins)[None, :] & seen[:, None], other=0)
            one += tl.dot(grads, pixels, input_precision=precision, out_dtype=wide)
        shares = tl.load(routing + b * k_count + k, mask=k < k_count, other=0).to(wide)
        total += shares[:, None, None] * one[None, :, :]
        inner = tl.sum(tl.sum(kernels * one[None, :, :], axis=2), axis=1)
        tl.store(routing_grads + (program.to(tl.int64) * batch + b) * k_count + k, inner, mask=k < k_count)
    tl.store(weight_grad + offsets, total, mask=mask)


def _forward(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    output = empty_output(input, weight.shape[1], weight, geometry)
    sizes, options = _sizes(input, weight, geometry), _options(input, weight)
    # A GPU's first axis alone has room for more than 65,535, as the tiles of large maps are.
    grid = (triton.cdiv(output[0, 0].numel(), POSITIONS), len(input), geometry.groups * triton.cdiv(sizes[2], TILE))
    with torch.cuda.device_of(input):
        _forward_kernel[grid](input, routing, _elements_first(weight), output, *sizes, **options)
    return output


def _backward(
    grad: Tensor, input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, needed: list[bool]
) -> list[Tensor]:
    grad, kernels = grad.contiguous(), _elements_first(weight)
    sizes, options = _sizes(input, weight, geometry), _options(input, weight)
    groups, ins, outs = sizes[:3]
    gradients = []
    if needed[0]:
        input_grad = torch.empty_like(input)
        grid = (triton.cdiv(input[0, 0].numel(), POSITIONS), len(input), groups * triton.cdiv(ins, TILE))
        _input_grad_kernel[grid](grad, routing, kernels, input_grad, *sizes, **options)
        gradients.append(input_grad)
    if needed[1] or needed[2]:
        grid = (kernels.shape[1], groups * triton.cdiv(outs, TILE), triton.cdiv(ins, TILE))
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.empty_like(kernels, dtype=wide)
        parts = torch.empty(grid[0] * grid[1] * grid[2], *routing.shape, dtype=wide, device=input.device)
        options["k_tile"] = triton.next_power_of_2(len(weight))
        _kernel_grads_kernel[grid](grad, input, routing, kernels, weight_grad, parts, len(input), *sizes, **options)
        found = (parts.sum(0).to(routing.dtype), weight_grad.permute(0, 2, 3, 1).reshape(weight.shape).to(weight.dtype))
        gradients += [gradient for gradient, need in zip(found, needed[1:], strict=True) if need]
    return gradients


def _elements_first(weight: Tensor) -> Tensor:
    """Lay out ``(K, C_out, C_in / groups, kH, kW)`` as ``(K, kH kW, C_out, C_in / groups)``."""
    return weight.flatten(3).permute(0, 3, 1, 2).contiguous()


def _sizes(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    stride, padding, dilation, groups = geometry
    channels = (groups, weight.shape[2], weight.shape[1] // groups)
    maps = (*input.shape[2:], *positions(input.shape, weight.shape, geometry))
    return *channels, *maps, *stride, *padding, *dilation, *weight.shape[3:]


def _options(input: Tensor, weight: Tensor) -> dict[str, Any]:
    return {
        "k_count": len(weight),
        "tile": TILE,
        "tile_p": POSITIONS,
        "wide": tl.float64 if input.dtype == torch.float64 else tl.float32,
        "precision": "tf32" if _allows_tf32() else "ieee",
    }


def _backward_there(grad: Tensor, *arguments: Any) -> list[Tensor]:
    with torch.cuda.device_of(grad):  # a kernel runs on the current device
        return _backward(grad, *arguments)


def _allows_tf32() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)  # where torch has it, the older name may raise
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


_convolve = mixing_operation("triton", _forward, _backward_there)


def convolve(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix tiles of the kernels where they are used."""
    return _convolve(input.contiguous(), routing.contiguous(), weight, geometry)
