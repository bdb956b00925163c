"""The convolution of each sample with kernels of its own, by torch's convolutions or, depthwise, in C++ of our own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample import depthwise
from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.layout import empty_output, format_of, is_channels_last
from dyn_lightning.per_sample.operation import operation
from dyn_lightning.per_sample.tracing import in_export, is_one, is_watched

# Numbers of a sample's input and output from which on, in channels_last, each sample has a convolution of its own: the
# samples as groups cannot keep that layout, since their channels would have to lie one after the other, and as groups
# depthwise convolutions are slow besides.
LARGE_MAPS, LARGE_DEPTHWISE_MAPS = 300_000, 1 << 16


def convolve(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each sample with kernels of its own.

    Args:
        input: ``(B, C_in, H, W)``.
        kernels: ``(B C_out, C_in / groups, kH, kW)``, those of sample b from b C_out on, in any memory format.
        geometry: of a sample's convolution.

    Returns:
        ``(B, C_out, H', W')``.
    """
    if torch.compiler.is_compiling():
        # Others run exports without us. Inductor would bring maps on a CPU, and kernels, into channels_last, in which a
        # convolution of many groups is slower.
        outside = in_export() or not input.is_cpu
        return (_as_groups if outside else _convolve)(input, kernels, geometry)
    trained = torch.is_grad_enabled() and (input.requires_grad or kernels.requires_grad)
    if depthwise.is_ours(input, kernels, geometry):
        through_torch = trained or is_watched(input, kernels)
        return (_convolve if through_torch else depthwise.forward)(input, kernels, geometry)
    if input.is_contiguous() or not is_convolved_singly(input, _of_one(kernels, input), geometry):
        return _as_groups(input, kernels, geometry)
    return (_convolve if trained else _singly)(input, kernels, geometry)


def gradients(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of ``convolve``.

    Args:
        grad: ``(B, C_out, H', W')``, of the output.
        input: as in ``convolve``.
        kernels: as in ``convolve``.
        geometry: of a sample's convolution.
        wanted: whether the gradient of the input is wanted, and that of the kernels.

    Returns:
        What is wanted, in the shapes of input and kernels.
    """
    if depthwise.is_ours(input, kernels, geometry):
        return depthwise.backward(grad, input, kernels, geometry, wanted)
    # A copy costs less than torch's slow gradient.
    wide = kernels.shape[3] > depthwise.MOST_COLUMNS
    if wide and depthwise.is_ours(input, kernels, geometry, layout="contiguous"):
        return depthwise.backward(grad, input.contiguous(), kernels, geometry, wanted)
    singly = is_convolved_singly(input, _of_one(kernels, input), geometry)
    return (_gradients_singly if singly else _gradients_as_groups)(grad, input, kernels, geometry, wanted)


def is_convolved_singly(input: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> bool:
    """Tell whether each sample has a convolution of its own; kernels in channels_last make it faster still.

    Args:
        input: ``(B, C_in, H, W)``.
        kernel: shape of a sample's, ``(C_out, C_in / groups, kH, kW)``.
        geometry: of a sample's convolution.
    """
    several = input.is_cpu and input.shape[0] > 1
    if not several or not is_channels_last(input) or torch.jit.is_tracing():  # to which sizes are tensors
        return False
    maps = math.prod(input.shape[1:]) + kernel[0] * math.prod(positions(input.shape, kernel, geometry))
    return maps >= (LARGE_DEPTHWISE_MAPS if kernel[1] == 1 else LARGE_MAPS)


def _of_one(kernels: Tensor, input: Tensor) -> tuple[int, ...]:
    return kernels.shape[0] // input.shape[0], *kernels.shape[1:]


def _singly(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    output = _empty(input, kernels, geometry)
    samples = zip(input.split(1), kernels.split(len(kernels) // len(input)), output.split(1), strict=True)
    for sample, its_kernels, place in samples:
        place.copy_(F.conv2d(sample, its_kernels, None, *geometry))
    return output


def _gradients_singly(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    samples = [grad.split(1), input.split(1), kernels.split(len(kernels) // len(input))]
    both = [torch.empty_like(of) if needed else None for of, needed in zip((input, kernels), wanted, strict=True)]
    for b, (its_grad, its_input, its_kernels) in enumerate(zip(*samples, strict=True)):
        found = _gradients_as_groups(its_grad, its_input, its_kernels, geometry, wanted)
        for whole, part in zip(both, found, strict=True):
            if whole is not None and part is not None:
                whole[b * len(part) : (b + 1) * len(part)] = part
    return both[0], both[1]


def _as_groups(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve by one convolution, whose groups are the samples: the usual form."""
    batch, _, *size = input.shape
    # A view of one image, or of its output, would hide from torch that it is channels_last.
    if is_one(batch):
        return F.conv2d(input, kernels, None, *geometry)
    stride, padding, dilation, groups = geometry
    output = F.conv2d(input.reshape(1, -1, *size), kernels, None, stride, padding, dilation, batch * groups)
    return output.view(batch, -1, *output.shape[2:])


def _gradients_as_groups(
    grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    (stride, padding, dilation, groups), batch, together = geometry, len(input), input
    if batch > 1:
        grad, together = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (grad, input))
    settings = (None, stride, padding, dilation, False, (0, 0), batch * groups, (*wanted, False))
    input_grad, kernels_grad, _ = torch.ops.aten.convolution_backward(grad, together, kernels, *settings)
    return None if input_grad is None else input_grad.view(input.shape), kernels_grad


def _forward(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    if depthwise.is_ours(input, kernels, geometry):
        return depthwise.forward(input, kernels, geometry)
    singly = is_convolved_singly(input, _of_one(kernels, input), geometry)
    output = (_singly if singly else _as_groups)(input, kernels, geometry)
    return output.contiguous(memory_format=format_of(input))  # as the compiler was told


def _backward(grad: Tensor, input: Tensor, kernels: Tensor, geometry: Geometry, needed: list[bool]) -> list[Tensor]:
    found = gradients(grad, input, kernels, geometry, (needed[0], needed[1]))
    return [gradient for gradient in found if gradient is not None]


def _empty(input: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    return empty_output(input, kernels.shape[0] // input.shape[0], kernels, geometry)


def _multiply_adds(input: torch.Size, kernels: torch.Size, geometry: Geometry) -> tuple[int, int]:
    return 0, kernels.numel() * math.prod(positions(input, kernels, geometry))


_convolve = operation("convolve", ("input", "kernels"), _forward, _backward, _as_groups, _empty, _multiply_adds)
