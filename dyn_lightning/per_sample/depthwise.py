"""Depthwise convolutions and their gradients on a CPU, in C++ of our own where torch's are slow.

oneDNN, which computes torch's convolutions there, brings maps into a layout of its own and back. It has a fast gradient
only for kernels of up to 3 columns whose output has more rows than there are rows of zeros around the input, and in
bfloat16 only without a stride; elsewhere it unfolds each channel, which takes several times as long.
"""

import ctypes
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.native import is_compiled, library
from dyn_lightning.per_sample.operation import operation
from dyn_lightning.per_sample.tracing import in_export, is_watched, remembered

MOST_COLUMNS = 3  # of kernels with a fast gradient in torch
# Positions of the output from which on ours takes less time than torch's fast one.
MANY_POSITIONS = {torch.float32: 36, torch.bfloat16: 256, torch.float64: 1}
MANY_STRIDED_POSITIONS = {**MANY_POSITIONS, torch.float32: 80}  # the same with a stride
# Steps of the stride, for each position of the output, up to which it is worth while to take maps apart by them.
MOST_STEPS = 64
# The time grows as the numbers of the unfolded input and this many for each channel do. Below the least in all, the
# call costs more than it saves.
NUMBERS_A_CHANNEL, LEAST_NUMBERS = 500, 1 << 20
LEAST_ASKED = 1 << 17  # numbers of the input, from which on it is asked in any case whether ours is faster
# Planes, of one image or of few channels, up to which maps of any size are faster where no operation of torch's has to
# be called.
FEW_PLANES = {torch.float32: 4096, torch.bfloat16: 1200, torch.float64: 4096}
MANY_PLANES = max(FEW_PLANES.values())


def convolve(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve as ``F.conv2d`` does, depthwise in our own way where that is faster."""
    planes, depth, *_ = kernels.shape
    compiling = torch.compiler.is_compiling()
    if depth > 1 or (compiling and in_export()):  # others run exports without us
        return F.conv2d(input, kernels, None, *geometry)
    trained = torch.is_grad_enabled() and (input.requires_grad or kernels.requires_grad)
    # Of small maps a few pay without a backward pass alone, many with one; to ask on would be seen in the others' time.
    unlikely = planes <= MANY_PLANES if trained else planes > MANY_PLANES
    if (unlikely and input.numel() < LEAST_ASKED) or not input.is_cpu or input.dtype not in MANY_POSITIONS:
        return F.conv2d(input, kernels, None, *geometry)
    few = not (trained or compiling) and planes <= FEW_PLANES[input.dtype]
    if not _is_ours(input, kernels, geometry, trained, few):
        return F.conv2d(input, kernels, None, *geometry)
    as_operation = trained or compiling or is_watched(input, kernels)
    return (_convolve if as_operation else _computed)(input, kernels, geometry)


def gradients(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute a convolution's gradients, in our own way where that is faster.

    Args:
        grad: ``(1, C_out, H', W')``, of the output.
        input: ``(1, C_in, H, W)``.
        kernels: ``(C_out, C_in / groups, kH, kW)``.
        geometry: of the convolution.
        wanted: whether the gradient of the input is wanted, and that of the kernels.

    Returns:
        What is wanted, in the shapes of input and kernels.
    """
    if input.is_cpu and kernels.shape[1] == 1 and kernels.shape[3] > MOST_COLUMNS:
        input = input.contiguous()  # a copy costs less than torch's slow gradient
    if _is_ours(input, kernels, geometry, training=True):
        kernels = kernels.contiguous()
        found = [torch.empty_like(of) if needed else None for of, needed in zip((input, kernels), wanted, strict=True)]
        _call("backward", geometry, grad.contiguous(), input, kernels, *found)
        return found[0], found[1]
    stride, padding, dilation, groups = geometry
    settings = (None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False))
    input_grad, kernels_grad, _ = torch.ops.aten.convolution_backward(grad, input, kernels, *settings)
    return input_grad, kernels_grad


def is_faster(
    input: tuple[int, ...],
    kernels: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    training: bool,
    within: bool = False,
) -> bool:
    """Tell whether ours is faster than torch's on a CPU, from the shapes that ``gradients`` takes.

    Within an operation, or without one, its call does not count.
    """
    channels, depth, height, width = kernels
    if input[:2] != (1, channels) or channels != geometry.groups or depth > 1 or dtype not in MANY_POSITIONS:
        return False
    rows, columns = positions(input, kernels, geometry)
    if math.prod(geometry.stride) > MOST_STEPS * rows * columns:
        return False
    if within and not training and channels <= FEW_PLANES[dtype]:
        return is_compiled()
    if channels * (rows * columns * height * width + NUMBERS_A_CHANNEL) < LEAST_NUMBERS:
        return False
    above = geometry.padding[0]
    below = (rows - 1) * geometry.stride[0] + geometry.dilation[0] * (height - 1) + 1 - above - input[2]
    slow = rows < above
    if training:
        many_zeros = rows <= above + max(0, below)
        strided = dtype == torch.bfloat16 and geometry.stride != (1, 1)
        slow = width > MOST_COLUMNS or many_zeros or strided
    many = MANY_POSITIONS if geometry.stride == (1, 1) else MANY_STRIDED_POSITIONS
    return (slow or rows * columns >= many[dtype]) and is_compiled()


def _is_ours(input: Tensor, kernels: Tensor, geometry: Geometry, training: bool, within: bool = False) -> bool:
    if not input.is_cpu or kernels.dtype != input.dtype or not input.is_contiguous():
        return False
    find = is_faster if torch.compiler.is_compiling() else _found
    return find(input.shape, kernels.shape, geometry, input.dtype, training, within)


_found = remembered(is_faster)  # on small maps each call in Python would be seen


def _forward(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    ours = _is_ours(input, kernels, geometry, training=False, within=True)  # or it was taken for its gradient alone
    return (_computed if ours else _conv2d)(input, kernels, geometry)


def _computed(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    output = _empty(input, kernels, geometry)
    _call("forward", geometry, output, input, kernels.contiguous())
    return output


def _backward(grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, needed: list[bool]) -> list[Tensor]:
    found = gradients(grad, input, kernels, geometry, (needed[0], needed[1]))
    return [gradient for gradient in found if gradient is not None]


def _call(name: str, geometry: Geometry, output: Tensor, input: Tensor, kernels: Tensor, *grads: Tensor | None) -> None:
    """Call a function of the library, which takes contiguous tensors, with an output or its gradient first."""
    function = _function(name, input.dtype)
    sizes = _sizes(input.shape[1:], output.shape[2:], kernels.shape[2:], geometry, torch.get_num_threads())
    function(sizes, *[None if tensor is None else tensor.data_ptr() for tensor in (output, input, kernels, *grads)])


@remembered
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [ctypes.c_void_p] * (6 if name == "backward" else 4)
    return cast(Callable[..., None], function)


@remembered
def _sizes(input: torch.Size, output: torch.Size, kernel: torch.Size, geometry: Geometry, threads: int) -> Any:
    """Give the ``Sizes`` of the library."""
    planes, *size = input
    used = min(threads, planes)  # each takes a few planes' memory
    sizes = (planes, *size, *output, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation, used)
    return (ctypes.c_int64 * len(sizes))(*sizes)


def _conv2d(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(input, kernels, None, *geometry)


def _empty(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    return input.new_empty(len(input), len(kernels), *positions(input.shape, kernels.shape, geometry))


def _multiply_adds(input: torch.Size, kernels: torch.Size, geometry: Geometry) -> tuple[int, int]:
    return 0, input[0] * kernels.numel() * math.prod(positions(input, kernels, geometry))


_convolve = operation("depthwise", ("input", "kernels"), _forward, _backward, _conv2d, _empty, _multiply_adds)
