"""The per-sample convolution a few samples at a time: their mixed kernels stay in the cache, and none is kept.

The usual form writes B mixed kernels to memory, reads them, and keeps them for the backward pass. Here a chunk of
samples and of output channels has its kernels mixed, used and forgotten; the backward pass mixes them again, which
costs K multiply-adds a weight and saves reading it from memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.methods import (
    Geometry,
    convolve_each,
    empty_output,
    grouped,
    is_channels_last,
    is_depthwise,
    multiplies,
    positions,
)
from dyn_lightning.per_sample.operation import operation

# Output channels are divided until so many samples fit into the limit, since each chunk reads all K kernels of its
# channels; convolutions of fewer channels than the least would not fill the processor.
WANTED_SAMPLES, LEAST_CHANNELS = 8, 64


def chunked(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> Tensor:
    """Mix, use and forget the kernels of a few samples at a time.

    Args:
        input: as in ``dynamic_conv2d``, like the next two.
        routing: one row a sample.
        weight: K kernels.
        geometry: of the convolution.
        limit: bytes that a chunk's mixed kernels, input and output may take; the smallest chunk may take more.
    """
    return _convolve(input, routing, weight, geometry, *chunk_size(input, weight, geometry, limit))


def chunk_size(input: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> tuple[int, int]:
    """Give how many samples, and how many output channels, have their kernels mixed at a time."""
    out_channels = weight.shape[1]
    rows, columns = positions(input.shape, weight.shape, geometry)
    channel = weight[0, 0].numel() * weight.element_size()
    maps = (input.shape[1:].numel() + out_channels * rows * columns) * input.element_size()
    if multiplies(weight.shape, geometry):
        maps = 0  # a product reads and writes them where they are
    channels = out_channels
    while geometry.groups == 1 and channels > LEAST_CHANNELS and WANTED_SAMPLES * channels * channel > limit:
        channels = -(-channels // 2)
    return max(1, limit // (channels * channel + maps)), channels


def _forward(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, samples: int, channels: int) -> Tensor:
    each = _multiply_each if multiplies(weight.shape, geometry) else _convolve_each
    if one_by_one(input, weight, geometry):
        each = _convolve_one_by_one
    flat = weight.flatten(1)
    output = empty_output(input, weight, geometry)
    for some, these, columns in _chunks(input, weight, samples, channels):
        kernels = (routing[some] @ flat[:, columns]).view(-1, *weight[0, these].shape)
        each(input[some], kernels, geometry, output[some, these])
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    routing: Tensor,
    weight: Tensor,
    geometry: Geometry,
    samples: int,
    channels: int,
    needed: list[bool],
) -> list[Tensor]:
    each = _multiply_each_backward if multiplies(weight.shape, geometry) else _convolve_each_backward
    if one_by_one(input, weight, geometry):
        each = _convolve_one_by_one_backward
    flat = weight.flatten(1)
    wide = torch.promote_types(weight.dtype, torch.float32)  # 16 bits would lose what is added last
    input_grad = torch.empty_like(input)
    routing_grad = torch.zeros_like(routing, dtype=wide)
    weight_grad = torch.zeros_like(flat, dtype=wide) if needed[2] else flat
    for some, these, columns in _chunks(input, weight, samples, channels):
        shares, part = routing[some], flat[:, columns]
        kernels = (shares @ part).view(-1, *weight[0, these].shape)
        mask = (needed[0], needed[1] or needed[2])
        places = (grad[some, these], input[some], kernels, geometry, mask, input_grad[some], these.start > 0)
        kernels_part = each(*places)
        if needed[1]:
            _add_product(routing_grad[some], kernels_part.flatten(1), part.mT)
        if needed[2]:
            _add_product(weight_grad[:, columns], shares.mT, kernels_part.flatten(1))
    gradients = (input_grad, routing_grad.to(routing.dtype), weight_grad.to(weight.dtype).view(weight.shape))
    return [gradient for gradient, need in zip(gradients, needed, strict=True) if need]


def _chunks(input: Tensor, weight: Tensor, samples: int, channels: int) -> Iterator[tuple[slice, slice, slice]]:
    """Give samples, output channels, and where the weights of these channels lie in a flattened kernel."""
    length, out_channels = weight[0, 0].numel(), weight.shape[1]
    for first in range(0, out_channels, channels):
        last = min(first + channels, out_channels)
        for sample in range(0, input.shape[0], samples):
            yield slice(sample, sample + samples), slice(first, last), slice(first * length, last * length)


def one_by_one(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Tell whether samples are convolved one by one: a depthwise convolution is fast in channels_last, which the
    samples as groups cannot keep, since their channels would have to lie one after the other.
    """
    return is_depthwise(weight.shape, geometry) and is_channels_last(input)


def _multiply_each(input: Tensor, kernels: Tensor, geometry: Geometry, output: Tensor) -> None:
    torch.bmm(kernels.flatten(2), input.flatten(2), out=output.flatten(2))


def _convolve_each(input: Tensor, kernels: Tensor, geometry: Geometry, output: Tensor) -> None:
    output.copy_(convolve_each(input, kernels, geometry))


def _convolve_one_by_one(input: Tensor, kernels: Tensor, geometry: Geometry, output: Tensor) -> None:
    for image, kernel, place in zip(input.split(1), kernels, output.split(1), strict=True):
        place.copy_(F.conv2d(image, kernel, None, *geometry))


# Each gives the kernels' gradients, and writes or adds the input's.


def _multiply_each_backward(
    grad: Tensor,
    input: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    mask: tuple[bool, bool],
    input_grad: Tensor,
    add: bool,
) -> Any:
    grads, matrices, total = grad.flatten(2), kernels.flatten(2), input_grad.flatten(2)
    if mask[0] and add:
        total.baddbmm_(matrices.mT, grads)
    elif mask[0]:
        torch.bmm(matrices.mT, grads, out=total)
    return mask[1] and (grads @ input.flatten(2).mT).view(kernels.shape)


def _convolve_each_backward(
    grad: Tensor,
    input: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    mask: tuple[bool, bool],
    input_grad: Tensor,
    add: bool,
) -> Any:
    stride, padding, dilation, groups = geometry
    folded = (grad, input) if len(input) == 1 else (t.reshape(1, -1, *t.shape[2:]) for t in (grad, input))
    settings = (None, stride, padding, dilation, False, (0, 0), len(input) * groups, (*mask, False))
    part, kernels_grad, _ = torch.ops.aten.convolution_backward(*folded, kernels.flatten(0, 1), *settings)
    if mask[0] and add:
        input_grad += part.view(input.shape)
    elif mask[0]:
        input_grad.copy_(part.view(input.shape))
    return mask[1] and kernels_grad.view(kernels.shape)


def _convolve_one_by_one_backward(
    grad: Tensor,
    input: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    mask: tuple[bool, bool],
    input_grad: Tensor,
    add: bool,
) -> Any:
    singly = zip(*(tensor.split(1) for tensor in (grad, input, kernels, input_grad)), strict=True)
    grads = [_convolve_each_backward(g, x, kernel, geometry, mask, place, add) for g, x, kernel, place in singly]
    return mask[1] and torch.cat(grads)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


_convolve = operation("chunked", _forward, _backward, grouped)
