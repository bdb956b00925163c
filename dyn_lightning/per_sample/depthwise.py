"""Depthwise convolutions and their gradients on a CPU, in C++ of our own where torch's are slow.

oneDNN, which computes torch's convolutions there, brings maps into a layout of its own and back. It has a fast gradient
only for kernels of up to 3 columns whose output has more rows than there are rows of zeros around the input, and in
bfloat16 only without a stride; elsewhere it unfolds each channel, which takes several times as long. In channels_last
it would need a call for each sample, since the channels of several cannot be groups of one map.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_output, format_of, layout_of
from dyn_lightning.per_sample.native import call, is_compiled
from dyn_lightning.per_sample.tracing import remembered

MOST_COLUMNS = 3  # of kernels with a fast gradient in torch
# Positions of the output from which on ours takes less time than torch's fast one.
MANY_POSITIONS = {torch.float32: 36, torch.bfloat16: 256, torch.float64: 1}
MANY_STRIDED_POSITIONS = {**MANY_POSITIONS, torch.float32: 80}  # the same with a stride
MANY_WIDE_POSITIONS = {**MANY_POSITIONS, torch.float32: 128}  # and of kernels with more columns, with a stride or not
# Numbers of a padded plane, taken apart by the stride, for each position of the output, up to which it is worth while
# to lay it out, in time and memory.
MOST_LAID_OUT = 64
# The time grows as the numbers of the unfolded input and this many for each channel do. Below the least in all, the
# call costs more than it saves.
NUMBERS_A_CHANNEL, LEAST_NUMBERS = 500, 1 << 20
LEAST_ASKED = 1 << 17  # numbers of the input, from which on it is asked in any case whether ours is faster
# Planes, of one image or of few channels, up to which maps of any size are faster where no operation of torch's has to
# be called (measured with maps of up to 20 pixels a side). The most of all types, since the type is asked for later.
FEW_PLANES = {torch.float32: 4096, torch.bfloat16: 1200, torch.float64: 4096}
MOST_PLANES = max(FEW_PLANES.values())
LEAST_CHANNELS = 16  # in channels_last: of the widest vector


def pays(input: Tensor, kernels: Tensor, geometry: Geometry, trained: bool) -> bool:
    """Tell whether ours is to compute ``convolution.convolve``, asking as little as can be where it is not."""
    planes, depth, _, columns = kernels.shape
    # Of small maps few pay without a backward pass, many with one; to ask on would be seen in the others' time.
    unlikely = planes <= MOST_PLANES and columns <= MOST_COLUMNS if trained else planes > MOST_PLANES
    if depth > 1 or (unlikely and input.numel() < LEAST_ASKED):
        return False
    return is_ours(input, kernels, geometry, trained, within=True)


def is_faster(
    input: tuple[int, ...],
    kernels: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    training: bool,
    within: bool = False,
    layout: str = "contiguous",
) -> bool:
    """Tell whether ours is faster than torch's on a CPU.

    Args:
        input: shape, as in ``convolution.convolve``.
        kernels: shape, as there.
        geometry: of a sample's convolution.
        dtype: of both.
        training: whether there is a backward pass too.
        within: whether no operation of torch's has to be called for it: its call does not count then.
        layout: of the input, "contiguous" or "channels_last".
    """
    planes, depth, height, width = kernels
    samples, channels = input[:2]
    if planes != samples * channels or channels != geometry.groups or depth > 1 or dtype not in MANY_POSITIONS:
        return False
    if layout == "channels_last":
        return serves_channels_last(samples, channels)
    rows, columns = positions(input, kernels, geometry)
    down, right = geometry.stride
    reach_down, reach_right = (
        distance * (length - 1) for distance, length in zip(geometry.dilation, kernels[2:], strict=True)
    )
    laid_out = down * right * (rows + reach_down // down) * (columns + reach_right // right)
    if laid_out > MOST_LAID_OUT * rows * columns:
        return False
    if within and not training and planes <= FEW_PLANES[dtype]:
        return is_compiled()
    if planes * (rows * columns * height * width + NUMBERS_A_CHANNEL) < LEAST_NUMBERS:
        return False
    above = geometry.padding[0]
    below = (rows - 1) * geometry.stride[0] + geometry.dilation[0] * (height - 1) + 1 - above - input[2]
    slow = rows < above
    if training:
        many_zeros = rows <= above + max(0, below)
        strided = dtype == torch.bfloat16 and geometry.stride != (1, 1)
        slow = width > MOST_COLUMNS or many_zeros or strided
    many = MANY_POSITIONS if geometry.stride == (1, 1) else MANY_STRIDED_POSITIONS
    many = MANY_WIDE_POSITIONS if width > MOST_COLUMNS else many
    return (slow or rows * columns >= many[dtype]) and is_compiled()


def serves_channels_last(samples: int, channels: int) -> bool:
    """Tell whether ours computes maps in channels_last; of one sample torch's is as fast."""
    return samples > 1 and channels >= LEAST_CHANNELS and is_compiled()


def is_ours(
    input: Tensor, kernels: Tensor, geometry: Geometry, training: bool, within: bool = False, layout: str = ""
) -> bool:
    """Tell whether ours is to compute these, as they lie in memory or if they lay otherwise."""
    if not (input.is_cpu and kernels.is_cpu) or kernels.dtype != input.dtype:
        return False
    layout = layout or layout_of(input)
    return layout != "strided" and _found(input.shape, kernels.shape, geometry, input.dtype, training, within, layout)


_found = remembered(is_faster)  # on small maps each call in Python would be seen


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


def _call(name: str, geometry: Geometry, output: Tensor, input: Tensor, kernels: Tensor, *grads: Tensor | None) -> None:
    """Call a function of the library, which takes dense tensors, with an output or its gradient first."""
    last = not input.is_contiguous()
    sizes = _sizes(input.shape, output.shape[2:], kernels.shape[2:], geometry, torch.get_num_threads(), last)
    call(f"{name}_last" if last else name, sizes, output, input, kernels, *grads)


@remembered
def _sizes(
    input: torch.Size, output: torch.Size, kernel: torch.Size, geometry: Geometry, threads: int, last: bool
) -> Any:
    """Give the ``Sizes`` of the library."""
    samples, channels = input[:2]
    used = min(threads, samples if last else samples * channels)  # each takes a few planes' memory
    sizes = (*input, *output, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation, used)
    return (ctypes.c_int64 * len(sizes))(*sizes)
