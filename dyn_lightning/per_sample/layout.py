"""How maps lie in memory: channel by channel (contiguous), pixel by pixel (channels_last), or otherwise."""

import torch
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.tracing import in_function_transform


def layout_of(input: Tensor) -> str:
    """Say how a map lies in memory: "contiguous", "channels_last", or "strided" for anything else."""
    if input.is_contiguous():
        return "contiguous"
    last = not in_function_transform() and input.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if last else "strided"


def is_channels_last(input: Tensor) -> bool:
    """Tell whether a map lies in memory pixel by pixel, and not channel by channel too."""
    return layout_of(input) == "channels_last"


def format_of(input: Tensor) -> torch.memory_format:
    """Give the format that a map's convolution has: channels_last if the map has, otherwise contiguous."""
    return torch.channels_last if is_channels_last(input) else torch.contiguous_format


def empty_map(input: Tensor, size: tuple[int, ...]) -> Tensor:
    """Give memory for a map of a size, in the format that a convolution of the input has."""
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=format_of(input))


def empty_output(input: Tensor, out_channels: int, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Give memory for the output of a convolution with ``(..., kH, kW)`` kernels."""
    return empty_map(input, (input.shape[0], out_channels, *positions(input.shape, kernels.shape, geometry)))
