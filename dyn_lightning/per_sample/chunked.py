"""The per-sample convolution a few samples at a time: their mixed kernels stay in the cache, and none is kept.

The usual form writes B mixed kernels to memory, reads them, and keeps them for the backward pass. Here a chunk of
samples and of output channels has its kernels mixed, used and forgotten; the backward pass mixes them again, which
costs K multiply-adds a weight and saves reading it from memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyn_lightning.per_sample.convolution import convolve, gradients
from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_map, empty_output, is_channels_last
from dyn_lightning.per_sample.methods import (
    mixing_operation,
    multiplies,
    unfolded,
)

# Output channels are divided until so many samples' kernels fit into the limit (or twice those that there are), since
# each chunk reads all K kernels of its channels; convolutions, and products, of fewer channels than the least would not
# fill the processor.
WANTED_SAMPLES, LEAST_CHANNELS, LEAST_OF_PRODUCTS = 16, 64, 32
# On a CPU a chunk's kernels, input and output should stay in the cache. One sample's kernels are mixed in smaller
# parts, which stay with the process where larger ones would be fetched from the system anew.
CACHED_BYTES, CACHED_BYTES_OF_ONE = 16 << 20, 8 << 20


def chunked(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, limit: int = CACHED_BYTES) -> Tensor:
    """Mix, use and forget the kernels of a few samples at a time.

    Args:
        input: as in ``dynamic_conv2d``, like the next two.
        routing: one row a sample.
        weight: K kernels.
        geometry: of the convolution.
        limit: bytes that a chunk's mixed kernels, input and output may take; the smallest chunk may take more.
    """
    return _convolve(input, routing, weight, geometry, limit)


def chunked_rows(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> Tensor:
    """Compute the same as products with the input, which is unfolded once, as a whole."""
    patches = unfolded(input, weight.shape[3:], geometry)[..., None]
    matrices = weight.flatten(2)[..., None, None]
    output = _convolve(patches, routing, matrices, Geometry((1, 1), (0, 0), (1, 1), 1), limit)
    return output.view(*output.shape[:2], *positions(input.shape, weight.shape, geometry))


def chunk_size(input: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> tuple[int, int]:
    """Give how many samples at most, and how many output channels, have their kernels mixed at a time."""
    rows, columns = positions(input.shape, weight.shape, geometry)
    kernel, place = weight[0, 0].numel() * weight.element_size(), rows * columns * input.element_size()
    pixels = input.shape[1:].numel() * input.element_size()
    is_product = multiplies(weight.shape, geometry)
    if is_product:  # a product reads a map that is dense, and writes one where it belongs, if it is a whole one
        pixels = 0 if input.is_contiguous() or is_channels_last(input) else pixels
    copied = 0 if is_product else place
    channels, wanted = weight.shape[1], min(WANTED_SAMPLES, 2 * len(input))  # two: half is left for the maps
    while geometry.groups == 1 and channels > (LEAST_OF_PRODUCTS if is_product else LEAST_CHANNELS):
        if max(wanted * channels * kernel, channels * (kernel + copied) + pixels) <= limit:
            break
        channels, copied = -(-channels // 2), place
    return max(1, limit // (channels * (kernel + copied) + pixels)), channels


def _forward(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> Tensor:
    compute, _ = _passes(weight, geometry)
    flat = weight.flatten(1)
    output = empty_output(input, weight.shape[1], weight, geometry)
    for some, these, columns in _chunks(input, weight, *chunk_size(input, weight, geometry, limit)):
        kernels = (routing[some] @ flat[:, columns]).view(-1, *weight[0, these].shape)
        compute(input[some], kernels, geometry, output[some, these])
        del kernels  # before the next ones are made
    return output


def _backward(
    grad: Tensor,
    input: Tensor,
    routing: Tensor,
    weight: Tensor,
    geometry: Geometry,
    limit: int,
    needed: list[bool],
) -> list[Tensor]:
    _, differentiate = _passes(weight, geometry)
    flat = weight.flatten(1)
    wide = torch.promote_types(weight.dtype, torch.float32)  # sums over many samples; 16 bits would lose the last
    input_grad = empty_map(input, input.shape) if needed[0] else input
    routing_grad = torch.zeros_like(routing, dtype=wide)
    weight_grad = torch.zeros_like(flat, dtype=wide) if needed[2] else flat
    mask = (needed[0], needed[1] or needed[2])
    for some, these, columns in _chunks(input, weight, *chunk_size(input, weight, geometry, limit)):
        shares, part = routing[some], flat[:, columns]
        kernels = (shares @ part).view(-1, *weight[0, these].shape)
        chunk = _Chunk(grad[some, these], input[some], kernels, input_grad[some])
        kernels_grad = differentiate(chunk, geometry, mask, these.start > 0)
        if needed[1]:
            _add_product(routing_grad[some], kernels_grad.flatten(1), part.mT)
        if needed[2]:
            _add_product(weight_grad[:, columns], shares.mT, kernels_grad.flatten(1))
        del kernels, chunk, kernels_grad
    gradients = (input_grad, routing_grad.to(routing.dtype), weight_grad.to(weight.dtype).view(weight.shape))
    return [gradient for gradient, need in zip(gradients, needed, strict=True) if need]


class _Chunk(NamedTuple):
    """What the backward pass of some samples and output channels takes, and where it puts the input's gradient."""

    grad: Tensor
    input: Tensor
    kernels: Tensor
    input_grad: Tensor


def _passes(weight: Tensor, geometry: Geometry) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Give what computes a chunk, forward into a part of the output, and backward.

    The latter takes which gradients are needed, of the input and of the mixed kernels, and whether the input's is to be
    added to what is there; it gives the kernels' gradient.
    """
    if multiplies(weight.shape, geometry):
        return _multiply_each, _multiply_each_backward
    return _convolve_each, _convolve_each_backward


def _chunks(input: Tensor, weight: Tensor, samples: int, channels: int) -> Iterator[tuple[slice, slice, slice]]:
    """Give samples, output channels, and where the weights of these channels lie in a flattened kernel."""
    length, out_channels = weight[0, 0].numel(), weight.shape[1]
    batch = max(1, len(input))
    samples = math.ceil(batch / math.ceil(batch / samples))  # chunks of one size, if there can be
    for first in range(0, out_channels, channels):
        last = min(first + channels, out_channels)
        for sample in range(0, input.shape[0], samples):
            yield slice(sample, sample + samples), slice(first, last), slice(first * length, last * length)


def _multiply_each(input: Tensor, kernels: Tensor, geometry: Geometry, output: Tensor) -> None:
    _multiply_into(output.view(*output.shape[:2], -1), kernels.flatten(2), input.flatten(2))


def _convolve_each(input: Tensor, kernels: Tensor, geometry: Geometry, output: Tensor) -> None:
    output.copy_(convolve(input, kernels.flatten(0, 1), geometry))


def _multiply_each_backward(chunk: _Chunk, geometry: Geometry, mask: tuple[bool, bool], add: bool) -> Tensor | None:
    grad, input, matrices = (tensor.flatten(2) for tensor in chunk[:3])
    if mask[0]:
        _multiply_into(chunk.input_grad.view(input.shape), matrices.mT, grad, add)
    return (grad @ input.mT).view(chunk.kernels.shape) if mask[1] else None


def _multiply_into(total: Tensor, left: Tensor, right: Tensor, add: bool = False) -> None:
    """Compute products into memory that lies in rows or columns; into other memory torch would do one at a time."""
    if total.mT.is_contiguous():
        total, left, right = total.mT, right.mT, left.mT
    if add:  # to whole maps
        total.baddbmm_(left, right)
    elif total.is_contiguous():
        torch.bmm(left, right, out=total)
    else:
        total.copy_(left @ right)


def _convolve_each_backward(chunk: _Chunk, geometry: Geometry, mask: tuple[bool, bool], add: bool) -> Tensor | None:
    grad, input, kernels, total = chunk
    part, kernels_grad = gradients(grad, input, kernels.flatten(0, 1), geometry, mask)
    if part is not None and add:
        total += part
    elif part is not None:
        total.copy_(part)
    return kernels_grad.view(kernels.shape) if kernels_grad is not None else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


_convolve = mixing_operation("chunked", _forward, _backward)
