"""All that the choice of a method depends on, and what follows from it: what there is to compute and to hold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dyn_lightning.per_sample.methods import (
    FEW_POSITIONS,
    Geometry,
    is_channels_last,
    is_depthwise,
    multiplies,
    positions,
)


class Case(NamedTuple):
    """All that a choice depends on."""

    input: torch.Size
    weight: torch.Size
    geometry: Geometry
    bytes_each: int
    device: str
    channels_last: bool
    dense: bool  # whether the input lies in memory without gaps
    training: bool
    max_mixed_bytes: int

    @property
    def allowed(self) -> int:
        """Bytes that may be held beside what autograd's gradients take as much again of."""
        return self.max_mixed_bytes // 2 if self.training else self.max_mixed_bytes

    @property
    def is_product(self) -> bool:
        """Whether a sample's convolution is one matrix product."""
        return multiplies(self.weight, self.geometry)

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input channel."""
        return is_depthwise(self.weight, self.geometry)

    @property
    def positions(self) -> int:
        """Positions of the output."""
        return math.prod(positions(self.input, self.weight, self.geometry))

    @property
    def mixed_weights(self) -> int:
        """Weights of the B mixed kernels."""
        return self.input[0] * math.prod(self.weight[1:])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a static convolution."""
        return self.mixed_weights * self.positions

    @property
    def outputs(self) -> int:
        """Numbers that a static convolution gives."""
        return self.input[0] * self.weight[1] * self.positions

    @property
    def patches(self) -> int:
        """Numbers of the unfolded input, none where it can be multiplied as it is."""
        if self.is_product:
            return 0 if self.dense else math.prod(self.input)
        return self.input[0] * self.input[1] * math.prod(self.weight[3:]) * self.positions

    @property
    def held(self) -> dict[str, int]:
        """Numbers that each method of torch's own operations holds at once, beside input, kernels and output."""
        laid_out = 0 if self.dense else math.prod(self.input)  # to put the batch into the groups
        if self.channels_last:  # and the output to be channels_last again
            laid_out = math.prod(self.input) + self.outputs
        outputs = self.weight[0] * self.outputs
        if self.is_product:
            mixture = outputs + math.prod(self.input)
        elif self.geometry.groups == 1 and self.positions <= FEW_POSITIONS:
            mixture = outputs + 2 * self.patches
        else:  # the mixing orders the outputs by kernels
            mixture = 2 * outputs if self.geometry.groups > 1 or self.channels_last else outputs
        mixed, last = self.mixed_weights, self.outputs if self.channels_last and not self.is_product else 0
        return {"grouped": mixed + laid_out, "matmul": mixed + self.patches + last, "mixture": mixture}


def case_of(input: Tensor, weight: Tensor, geometry: Geometry, training: bool, max_mixed_bytes: int) -> Case:
    """Say all that the choice of a method depends on."""
    channels_last = is_channels_last(input)
    where = (input.element_size(), input.device.type, channels_last, channels_last or input.is_contiguous())
    images, kernels = input.shape, weight.shape
    if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
        images, kernels = _hints(images), _hints(kernels)
    return Case(images, kernels, geometry, *where, training, max_mixed_bytes)


def _hints(shape: torch.Size) -> torch.Size:
    """Give an export's open sizes the values of its example, since a choice by the open ones would fix them."""
    return torch.Size([size.node.hint if isinstance(size, torch.SymInt) else size for size in shape])
