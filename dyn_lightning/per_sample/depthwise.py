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
from dyn_lightning.per_sample.layout import empty_map, format_of, layout_of
from dyn_lightning.per_sample.native import is_compiled, library
from dyn_lightning.per_sample.operation import operation
from dyn_lightning.per_sample.tracing import in_export, is_watched, remembered

MOST_COLUMNS = 3  # of kernels with a fast gradient in torch
# Positions of the output from which on ours takes less time than torch's fast one.
MANY_POSITIONS = {torch.float32: 36, torch.bfloat16: 256, torch.float64: 1}
MANY_STRIDED_POSITIONS = {**MANY_POSITIONS, torch.float32: 80}  # the same with a stride
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


def convolve(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each sample with kernels of its own, depthwise in our own way where that is faster.

    Args:
        input: ``(B, C_in, H, W)``.
        kernels: ``(B C_out, C_in / groups, kH, kW)``, those of sample b from b C_out on.
        geometry: of a sample's convolution.

    Returns:
        ``(B, C_out, H', W')``.
    """
    planes, depth, _, columns = kernels.shape
    if torch.compiler.is_compiling():
        # Others run exports without us. Inductor would bring maps on a CPU, and kernels, into channels_last, in which a
        # convolution of many groups is slower.
        outside = in_export() or not input.is_cpu
        return (_as_groups if outside else _convolve)(input, kernels, geometry)
    if depth > 1:
        return _as_groups(input, kernels, geometry)
    trained = torch.is_grad_enabled() and (input.requires_grad or kernels.requires_grad)
    # Of small maps few pay without a backward pass alone, many with one; to ask on would be seen in the others' time.
    unlikely = planes <= MOST_PLANES and columns <= MOST_COLUMNS if trained else planes > MOST_PLANES
    if (unlikely and input.numel() < LEAST_ASKED) or not input.is_cpu or input.dtype not in MANY_POSITIONS:
        return _as_groups(input, kernels, geometry)
    if not _is_ours(input, kernels, geometry, trained, within=True):
        return _as_groups(input, kernels, geometry)
    as_operation = trained or is_watched(input, kernels)
    return (_convolve if as_operation else _computed)(input, kernels, geometry)


def gradients(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of ``convolve``, in our own way where that is faster.

    Args:
        grad: ``(B, C_out, H', W')``, of the output.
        input: as in ``convolve``.
        kernels: as in ``convolve``.
        geometry: of a sample's convolution.
        wanted: whether the gradient of the input is wanted, and that of the kernels.

    Returns:
        What is wanted, in the shapes of input and kernels.
    """
    ours = _is_ours(input, kernels, geometry, training=True)
    # A copy costs less than torch's slow gradient.
    if not ours and kernels.shape[3] > MOST_COLUMNS and _is_ours(input, kernels, geometry, True, layout="contiguous"):
        input, ours = input.contiguous(), True
    if ours:
        kernels, grad = kernels.contiguous(), grad.contiguous(memory_format=format_of(input))
        found = [torch.empty_like(of) if needed else None for of, needed in zip((input, kernels), wanted, strict=True)]
        _call("backward", geometry, grad, input, kernels, *found)
        return found[0], found[1]
    together, (stride, padding, dilation, groups) = _together(input, geometry)
    settings = (None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False))
    if together is not input:
        grad = grad.reshape(1, -1, *grad.shape[2:])
    input_grad, kernels_grad, _ = torch.ops.aten.convolution_backward(grad, together, kernels, *settings)
    return None if input_grad is None else input_grad.view(input.shape), kernels_grad


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
        input: shape, as in ``convolve``.
        kernels: shape, as in ``convolve``.
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
    return (slow or rows * columns >= many[dtype]) and is_compiled()


def serves_channels_last(samples: int, channels: int) -> bool:
    """Tell whether ours computes maps in channels_last; of one sample torch's is as fast."""
    return samples > 1 and channels >= LEAST_CHANNELS and is_compiled()


def _is_ours(
    input: Tensor, kernels: Tensor, geometry: Geometry, training: bool, within: bool = False, layout: str = ""
) -> bool:
    """Tell whether ours is to compute these, as they lie in memory or if they lay otherwise."""
    if not (input.is_cpu and kernels.is_cpu) or kernels.dtype != input.dtype:
        return False
    layout = layout or layout_of(input)
    return layout != "strided" and _found(input.shape, kernels.shape, geometry, input.dtype, training, within, layout)


_found = remembered(is_faster)  # on small maps each call in Python would be seen


def _forward(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    if _is_ours(input, kernels, geometry, training=False, within=True):  # or it was taken for its gradient alone
        return _computed(input, kernels, geometry)
    return _as_groups(input, kernels, geometry).contiguous(memory_format=format_of(input))  # as the compiler was told


def _computed(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    output = _empty(input, kernels, geometry)
    _call("forward", geometry, output, input, kernels.contiguous())
    return output


def _backward(grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, needed: list[bool]) -> list[Tensor]:
    found = gradients(grad, input, kernels, geometry, (needed[0], needed[1]))
    return [gradient for gradient in found if gradient is not None]


def _call(name: str, geometry: Geometry, output: Tensor, input: Tensor, kernels: Tensor, *grads: Tensor | None) -> None:
    """Call a function of the library, which takes dense tensors, with an output or its gradient first."""
    last = not input.is_contiguous()
    function = _function(f"{name}_last" if last else name, input.dtype)
    sizes = _sizes(input.shape, output.shape[2:], kernels.shape[2:], geometry, torch.get_num_threads(), last)
    places = [None if tensor is None else tensor.data_ptr() for tensor in (output, input, kernels, *grads)]
    if 0 in places:
        raise RuntimeError(f"input of shape {tuple(input.shape)}, its kernels or its output have no memory (anymore)")
    function(sizes, *places)


@remembered
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [ctypes.c_void_p] * (6 if name.startswith("backward") else 4)
    return cast(Callable[..., None], function)


@remembered
def _sizes(
    input: torch.Size, output: torch.Size, kernel: torch.Size, geometry: Geometry, threads: int, last: bool
) -> Any:
    """Give the ``Sizes`` of the library."""
    samples, channels = input[:2]
    used = min(threads, samples if last else samples * channels)  # each takes a few planes' memory
    sizes = (*input, *output, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation, used)
    return (ctypes.c_int64 * len(sizes))(*sizes)


def _as_groups(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve by one convolution of torch's, whose groups are the samples."""
    together, geometry = _together(input, geometry)
    output = F.conv2d(together, kernels, None, *geometry)
    return output if together is input else output.view(input.shape[0], -1, *output.shape[2:])


def _together(input: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    batch, _, *size = input.shape
    # A view of one image, or of its output, would hide from torch that it is channels_last. In an export, to compare
    # would close what is left open of the batch; a tracer's sizes are tensors.
    if not torch.compiler.is_compiling() and type(batch) is int and batch == 1:
        return input, geometry
    stride, padding, dilation, groups = geometry
    return input.reshape(1, -1, *size), Geometry(stride, padding, dilation, batch * groups)


def _empty(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    samples = input.shape[0]
    return empty_map(input, (samples, kernels.shape[0] // samples, *positions(input.shape, kernels.shape, geometry)))


def _multiply_adds(input: torch.Size, kernels: torch.Size, geometry: Geometry) -> tuple[int, int]:
    return 0, kernels.numel() * math.prod(positions(input, kernels, geometry))


_convolve = operation("depthwise", ("input", "kernels"), _forward, _backward, _as_groups, _empty, _multiply_adds)
