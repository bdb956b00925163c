"""Depthwise convolutions and their gradients on a CPU, in C++ of our own.

oneDNN, which computes torch's convolutions there, brings maps into a layout of its own and back. It has a fast gradient
only for kernels of up to 3 columns whose output has more rows than there are rows of zeros around the input, and in
bfloat16 only without a stride; elsewhere it unfolds each channel, which takes several times as long. In channels_last
it would need a call for each sample, since the channels of several cannot be groups of one map.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_output, format_of, layout_of
from dyn_lightning.per_sample.native import call, is_compiled
from dyn_lightning.per_sample.tracing import remembered

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MOST_COLUMNS = 3  # of kernels with a fast gradient in torch
# Pixels of a map up to which as many planes at once as a vector has lanes, turned to lie side by side, take less time
# than one by one: they are to fit into near caches. With a stride, one plane has to be taken apart. If a thread has
# fewer planes than these, ten or five vectors of 16 lanes, that holds of small ones alone.
MOST_TOGETHER = {torch.float32: 2000, torch.bfloat16: 2000, torch.float64: 900}
MOST_TOGETHER_WITH_STRIDE = {torch.float32: 6400, torch.bfloat16: math.inf, torch.float64: 6400}
LEAST_TOGETHER, LEAST_TOGETHER_WITH_STRIDE = 160, 80
MOST_OF_FEW_TOGETHER = 200
# Numbers of a padded plane, taken apart by the stride, for each position of the output, up to which it is worth while
# to lay it out, in time and memory; larger ones are computed together, or not at all.
MOST_LAID_OUT = 64
LEAST_CHANNELS = 16  # in channels_last: of the widest vector


def is_ours(input: Tensor, kernels: Tensor, geometry: Geometry, layout: str = "") -> bool:
    """Tell whether ours is to compute ``convolution.convolve``, as the input lies in memory or if it lay otherwise."""
    if kernels.shape[1] > 1 or kernels.dtype != input.dtype or not (input.is_cpu and kernels.is_cpu):
        return False
    layout = layout or layout_of(input)
    return layout != "strided" and _found(input.shape, kernels.shape, geometry, input.dtype, layout)


def serves(
    input: tuple[int, ...],
    kernels: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    layout: str = "contiguous",
) -> bool:
    """Tell whether ours computes dense maps on a CPU, in less time than torch but on few shapes (README's Speed).

    Args:
        input: shape, as in ``convolution.convolve``.
        kernels: shape, as there.
        geometry: of a sample's convolution.
        dtype: of both.
        layout: of the input, "contiguous" or "channels_last".
    """
    planes, depth = kernels[:2]
    samples, channels = input[:2]
    if planes != samples * channels or channels != geometry.groups or depth > 1 or dtype not in DTYPES:
        return False
    if layout == "channels_last":
        return serves_channels_last(samples, channels)
    large = _is_laid_out_large(positions(input, kernels, geometry), kernels[2:], geometry)
    # The choice of a method depends on this, so it is the same for any number of threads.
    return (not large or _is_together(input, geometry, dtype, 1)) and is_compiled()


_found = remembered(serves)  # on small maps each call in Python would be seen


def serves_channels_last(samples: int, channels: int) -> bool:
    """Tell whether ours computes maps in channels_last; of one sample torch's is as fast."""
    return samples > 1 and channels >= LEAST_CHANNELS and is_compiled()


def forward(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Compute what ``is_ours``."""
    output = empty_output(input, kernels.shape[0] // input.shape[0], kernels, geometry)
    _call("forward", geometry, output, input, kernels.contiguous())
    return output


def backward(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of what ``is_ours``, as ``convolution.gradients`` says."""
    kernels, grad = kernels.contiguous(), grad.contiguous(memory_format=format_of(input))
    found = [torch.empty_like(of) if needed else None for of, needed in zip((input, kernels), wanted, strict=True)]
    _call("backward", geometry, grad, input, kernels, *found)
    return found[0], found[1]


def _is_laid_out_large(output: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> bool:
    laid_out = 1
    for count, length, step, distance in zip(output, kernel, geometry.stride, geometry.dilation, strict=True):
        laid_out *= step * (count + distance * (length - 1) // step)
    return laid_out > MOST_LAID_OUT * math.prod(output)


def _is_together(input: Sequence[int], geometry: Geometry, dtype: torch.dtype, threads: int) -> bool:
    planes, pixels = math.prod(input[:2]) / threads, math.prod(input[2:])
    if planes < (LEAST_TOGETHER if geometry.stride == (1, 1) else LEAST_TOGETHER_WITH_STRIDE):
        return pixels <= MOST_OF_FEW_TOGETHER
    return pixels <= (MOST_TOGETHER if geometry.stride == (1, 1) else MOST_TOGETHER_WITH_STRIDE)[dtype]


def _call(name: str, geometry: Geometry, output: Tensor, input: Tensor, kernels: Tensor, *grads: Tensor | None) -> None:
    """Call a function of the library, which takes dense tensors, with an output or its gradient first."""
    last = not input.is_contiguous()
    shapes = input.shape, output.shape[2:], kernels.shape[2:]
    sizes = _sizes(*shapes, geometry, input.dtype, torch.get_num_threads(), last)
    call(f"{name}_last" if last else name, sizes, output, input, kernels, *grads)


@remembered
def _sizes(
    input: torch.Size,
    output: torch.Size,
    kernel: torch.Size,
    geometry: Geometry,
    dtype: torch.dtype,
    threads: int,
    last: bool,
) -> Any:
    """Give the ``Sizes`` of the library."""
    samples, channels = input[:2]
    together = _is_together(input, geometry, dtype, threads) or _is_laid_out_large(output, kernel, geometry)
    used = min(threads, samples if last else samples * channels)  # each takes some planes' memory
    sizes = (*input, *output, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation, used, together)
    return (ctypes.c_int64 * len(sizes))(*sizes)
