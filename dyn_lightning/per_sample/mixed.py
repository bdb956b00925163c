"""The per-sample convolution in C++ of our own, which mixes a block of the kernels where it is used.

The usual form writes the B mixed kernels to memory and reads them again, in training three times. Here a block of some
64 input and 64 output channels at one place of the kernel is mixed for four samples, multiplied with their whole maps
from a near cache, and forgotten. The backward pass mixes it again; a block of the mixed kernels' gradient is given to
the K kernels and to the routing at once. The kernels are brought into another order first.

Two kinds have ways of their own, which take the kernels as they lie: contiguous maps of 64 pixels or more with 1x1
kernels (products.cpp), and the output of one sample with few positions (one_sample.cpp).
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_map, format_of, is_channels_last
from dyn_lightning.per_sample.methods import mixing_operation, multiplies
from dyn_lightning.per_sample.native import call, is_compiled
from dyn_lightning.per_sample.tracing import is_watched, remembered

LEAST_CHANNELS = {torch.float32: 16, torch.float64: 8}  # of the widest vector
BLOCK, VECTOR = 64, 16  # channels of a block of the kernels, in both directions, and of the widest vector
MOST_POSITIONS = 64  # of one sample, that one_sample.cpp computes: four of the widest vectors
LEAST_PIXELS = 64  # of maps whose pixels products.cpp multiplies as they lie: four of the widest vectors
# Of maps whose products it sums up for each weight: where pixels are fewer or weights more, it takes longer than to
# turn the maps.
LEAST_SUMMED, MOST_SUMMED = 256, 4096
# Numbers of gradients of the K kernels, each of a part of the samples, that threads may sum up beside each other.
MOST_IN_PARTS = 1 << 22


def cpp(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix blocks of the kernels where they are used, in C++."""
    if why := why_not(input.shape, weight.shape, geometry, input.dtype, input.device.type, is_channels_last(input)):
        raise ValueError(f"method='cpp' {why}: take 'auto'")
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, routing, weight))
    through_torch = trained or torch.compiler.is_compiling() or is_watched(input, routing, weight)
    return (_convolve if through_torch else _forward)(input, routing, weight, geometry)


def why_not(
    input: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    device: str,
    channels_last: bool,
) -> str:
    """Say why our C++ does not compute a convolution, or nothing if it does."""
    if device != "cpu":
        return f"computes on CPUs, not on {device}"
    if dtype not in LEAST_CHANNELS:
        return f"computes torch.float32 and torch.float64, not {dtype}"
    if geometry.groups != 1:
        return f"computes convolutions of one group, not of {geometry.groups}"
    if min(weight[1:3]) < LEAST_CHANNELS[dtype] and not _sums_up_planes(input, weight, geometry, not channels_last):
        return (
            f"computes {LEAST_CHANNELS[dtype]} or more channels, fewer with 1x1 kernels alone, without padding, of up "
            f"to {MOST_SUMMED} weights, in contiguous maps of {LEAST_SUMMED} or more pixels, not {weight[2]} to "
            f"{weight[1]}"
        )
    return "" if is_compiled() else "needs Linux and a C++ compiler"


def numbers_held(
    input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, training: bool, planes: bool
) -> int:
    """Numbers that are held beside dense maps: the kernels in another order, unless products.cpp computes all, or what
    few positions of one sample see; in training half of the larger of both, with the sums of the kernels' gradients,
    since it is allowed twice as much.

    Each thread takes a block of a map besides, or of several maps that come to 4 MB, and blocks of kernels.

    Args:
        input: shape of the maps.
        weight: shape of the K kernels.
        geometry: of the convolution.
        training: whether there is a backward pass.
        planes: whether the maps are contiguous.
    """
    numbers, seen, shapes = math.prod(weight), numbers_seen(input, weight, geometry), (input, weight, geometry)
    if not training:
        return seen or (0 if _multiplies_planes(*shapes, planes) else numbers)
    # At most: fewer samples, or threads, have fewer parts.
    in_parts = MOST_IN_PARTS if input[0] > 1 and 2 * numbers <= MOST_IN_PARTS else 0
    ordered = 0 if _sums_up_planes(*shapes, planes) else numbers
    return -(-max(seen, ordered + in_parts) // 2)


def numbers_seen(input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> int:
    """Numbers of what all positions see, as one_sample.cpp lays it out, or 0 where it does not compute."""
    count = math.prod(positions(input, weight, geometry))
    if input[0] != 1 or count > MOST_POSITIONS:
        return 0
    return math.prod(weight[2:]) * (count if count < VECTOR else -(-count // VECTOR) * VECTOR)


def _forward(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    size, seen = _to_allocate(input.shape, weight.shape, geometry)
    output, format = empty_map(input, size), format_of(input)
    input, routing, weight = input.contiguous(memory_format=format), routing.contiguous(), weight.contiguous()
    sizes = _sizes_of(input, weight, geometry)
    if seen:
        call("one_sample", sizes, input, routing, weight, input.new_empty(seen), output)
    elif _multiplies_planes(input.shape, weight.shape, geometry, _is_planes(input)):
        call("products_forward", sizes, input, routing, weight, output)
    else:
        call("mixed_forward", sizes, input, routing, weight, _ordered(weight), output)
    return output


@remembered
def _to_allocate(input: torch.Size, weight: torch.Size, geometry: Geometry) -> tuple[tuple[int, ...], int]:
    """Give the output's size, and ``numbers_seen``: at once, since on small maps each call in Python would be seen."""
    size = (input[0], weight[1], *positions(input, weight, geometry))
    return size, numbers_seen(input, weight, geometry)


def _backward(
    grad: Tensor, input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, needed: list[bool]
) -> list[Tensor]:
    format = format_of(input)
    grad, input = grad.contiguous(memory_format=format), input.contiguous(memory_format=format)
    routing, weight = routing.contiguous(), weight.contiguous()
    shapes, planes, threads = (input.shape, weight.shape, geometry), _is_planes(input), torch.get_num_threads()
    multiplied, summed = _multiplies_planes(*shapes, planes), _sums_up_planes(*shapes, planes)
    ordered = [] if summed else [_ordered(weight)]
    gradients = list[Tensor]()
    if needed[0]:
        input_grad = torch.empty_like(input, memory_format=format)
        sizes = _sizes_of(input, weight, geometry)
        if multiplied:
            call("products_backward", sizes, grad, routing, weight, input_grad)
        else:
            call("mixed_backward", sizes, grad, routing, weight, *ordered, input_grad)
        gradients.append(input_grad)
    if needed[1] or needed[2]:
        block = _block(*shapes, planes, threads)
        blocks = math.prod(-(-channels // most) for channels, most in zip(weight.shape[1:3], block, strict=True))
        parts = _parts(blocks, weight.numel(), len(input), threads)
        shares = routing.new_zeros(blocks, *routing.shape)
        sums = weight.new_empty(parts, *weight.shape) if needed[2] else None
        name = "products_differentiate" if summed else "mixed_differentiate"
        sizes = _sizes_of(input, weight, geometry, parts)
        call(name, sizes, grad, input, routing, weight, *ordered, shares, sums)
        gradients += [shares.sum(0)] if needed[1] else []
        gradients += [] if sums is None else [sums.sum(0) if parts > 1 else sums[0]]
    return gradients


def _ordered(weight: Tensor) -> Tensor:
    """Give memory for the kernels in another order, which mixed.cpp brings them into, by whole vectors of channels."""
    assert min(weight.shape[1:3]) >= LEAST_CHANNELS[weight.dtype], "it would write beyond its blocks"
    return torch.empty_like(weight)


def _multiplies_planes(input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, planes: bool) -> bool:
    """Tell whether products.cpp convolves: pixels as they lie, with kernels of one weight."""
    return planes and multiplies(weight, geometry) and math.prod(input[2:]) >= LEAST_PIXELS


def _sums_up_planes(input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, planes: bool) -> bool:
    """Tell whether it also gives the gradients of routing weights and kernels."""
    fits = math.prod(input[2:]) >= LEAST_SUMMED and math.prod(weight[1:]) <= MOST_SUMMED
    return fits and _multiplies_planes(input, weight, geometry, planes)


def _parts(blocks: int, numbers: int, samples: int, threads: int) -> int:
    """Say into how many parts the samples are divided, so that each thread has as many blocks to sum up."""
    wanted = threads // math.gcd(blocks, threads) if blocks < 8 * threads else 1
    return max(1, min(wanted, samples, MOST_IN_PARTS // numbers))


@remembered
def _block(input: torch.Size, weight: torch.Size, geometry: Geometry, planes: bool, threads: int) -> tuple[int, int]:
    """Give the most output and input channels of a block: where one side has few, products of pixels have more of the
    other, so that they read and write whole pixels, if there are samples enough for all threads. Where planes are
    summed up, as few output channels as give all threads a part.
    """
    if _sums_up_planes(input, weight, geometry, planes):
        return -(-weight[1] // -(-threads // max(1, input[0]))), weight[2]
    if planes or not multiplies(weight, geometry) or input[0] < threads:
        return BLOCK, BLOCK
    # In whole vectors, and no more weights than BLOCK squared.
    out_channels, in_channels = (max(BLOCK, BLOCK**2 // of // VECTOR * VECTOR) for of in (weight[2], weight[1]))
    return out_channels, in_channels


def _sizes_of(input: Tensor, weight: Tensor, geometry: Geometry, parts: int = 1) -> Any:
    return _sizes(input.shape, weight.shape, geometry, _is_planes(input), parts, torch.get_num_threads())


def _is_planes(input: Tensor) -> bool:
    return format_of(input) == torch.contiguous_format


@remembered
def _sizes(input: torch.Size, weight: torch.Size, geometry: Geometry, planes: bool, parts: int, threads: int) -> Any:
    """Give the ``Sizes`` of the library."""
    out_block, in_block = _block(input, weight, geometry, planes, threads)
    samples, in_channels, *pixels = input
    kernels, out_channels, _, *kernel = weight
    stride, padding, dilation, _ = geometry
    outputs = list(positions(input, weight, geometry))
    if multiplies(weight, geometry):
        outputs = pixels = [1, math.prod(pixels)]  # a long row is divided better than several short ones
    sizes = [samples, kernels, in_channels, *pixels, out_channels, *outputs, *kernel]
    sizes += [*stride, *padding, *dilation, planes, in_block, out_block, parts, threads]
    return (ctypes.c_int64 * len(sizes))(*sizes)


_convolve = mixing_operation("cpp", _forward, _backward)
