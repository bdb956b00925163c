"""What a convolution computes that cannot be seen in its output, and how to leave it out."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.per_sample.geometry import Geometry, Pair, is_depthwise, output_length, padding_in_numbers
from dyn_lightning.per_sample.layout import format_of, is_channels_last

# To cut kernels copies what is left of all K. That pays where at most this part is left: else the outputs of all K, as
# they are, take less time (of 3x3 kernels with a stride on 2x2 maps up to 128 images). Of depthwise kernels, which are
# always mixed first, it pays with a backward pass, or if so many weights of a sample's kernels are saved.
MOST_LEFT, LEAST_SAVED = 1 / 5, 3_000


class Plan(NamedTuple):
    """How a convolution is brought to the least that is to be computed."""

    zeros: tuple[int, ...]  # what "same" has more of on one side, for F.pad
    step: Pair  # of the pixels that 1x1 kernels see
    unseen: tuple[int, ...]  # what is cut off kernels, negative, for F.pad
    input: tuple[int, ...]  # the sizes that are left
    weight: tuple[int, ...]
    geometry: Geometry  # with the padding in numbers
    reduces: bool  # whether anything is to be done to input or weight


def reduced(input: Tensor, weight: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Leave out of kernels what only ever sees padding, and of the input the pixels that strided 1x1 kernels skip."""
    if plan.zeros:
        input = F.pad(input.contiguous(memory_format=format_of(input)), plan.zeros)  # which keeps the order of strides
    if plan.step != (1, 1):
        last = is_channels_last(input)
        input = input[:, :, :: plan.step[0], :: plan.step[1]]
        if last:  # the output is to be channels_last too
            input = input.contiguous(memory_format=torch.channels_last)
    if plan.unseen:
        weight = F.pad(weight, plan.unseen)  # cut by a pad: its gradient is widened in one pass
    return input, weight


def plan_of(
    input: tuple[int, ...],
    weight: tuple[int, ...],
    steps: Pair,
    padding: Pair | str,
    distances: Pair,
    groups: int,
    training: bool,
) -> Plan:
    """Find what is to be left out of a convolution.

    Raises:
        ValueError: weight and input do not fit each other, a size is 0, or the kernel is larger than the padded input.
    """
    if len(weight) != 5:
        raise ValueError(f"weight of shape {tuple(weight)} must be (K, C_out, C_in / groups, kH, kW)")
    _, out_channels, group_channels, *_ = weight
    if input[1] != group_channels * groups or out_channels % groups:
        raise ValueError(
            f"input of {input[1]} channels and groups={groups} must agree with weight of shape {tuple(weight)}: "
            f"C_in = {group_channels} * groups, and groups must divide C_out = {out_channels}"
        )
    if 0 in weight or 0 in input[1:]:
        raise ValueError(f"input of shape {tuple(input)} and weight of shape {tuple(weight)}: only B may be 0")
    zeros, sides = padding_in_numbers(input, padding, (weight[3], weight[4]), steps, distances)
    size, lengths = [input[2] + zeros[3], input[3] + zeros[1]] if zeros else input[2:], list(weight[3:])
    padded, unseen = list(sides), [0, 0, 0, 0]
    for axis in (0, 1):  # of 3x3 kernels on one pixel, the middle is left
        count = output_length(size[axis], lengths[axis], steps[axis], padded[axis], distances[axis])
        if count < 1:
            raise ValueError(
                f"input of {size[axis]} {('rows', 'columns')[axis]}, padded by {padded[axis]} on both sides, must not "
                f"be smaller than the kernel of {lengths[axis]}, dilated by {distances[axis]}: add padding"
            )
        first = max(0, -(-(padded[axis] - (count - 1) * steps[axis]) // distances[axis]))
        last = min(lengths[axis] - 1, (size[axis] - 1 + padded[axis]) // distances[axis])
        length, rest = last - first + 1, padded[axis] - first * distances[axis]
        # Nothing is cut off where the padding would have to differ between the sides.
        even = rest >= 0 and output_length(size[axis], length, steps[axis], rest, distances[axis]) == count
        if 0 < length < lengths[axis] and even:
            unseen[2 - 2 * axis : 4 - 2 * axis] = -first, last + 1 - lengths[axis]
            lengths[axis], padded[axis] = length, rest
    if any(unseen) and (input[0] == 1 or not _pays(weight, math.prod(lengths), groups, training)):
        unseen, lengths, padded = [0, 0, 0, 0], list(weight[3:]), list(sides)
    step = steps if lengths == [1, 1] and not any(padded) else (1, 1)
    steps = (1, 1) if step == steps else steps
    left = (*input[:2], -(-size[0] // step[0]), -(-size[1] // step[1]))
    geometry = Geometry(steps, (padded[0], padded[1]), distances, groups)
    reduces = bool(zeros) or step != (1, 1) or any(unseen)
    return Plan(zeros, step, tuple(unseen) if any(unseen) else (), left, (*weight[:3], *lengths), geometry, reduces)


def _pays(weight: tuple[int, ...], left: int, groups: int, training: bool) -> bool:
    """Tell whether it pays to cut kernels to so many positions; one sample mixes them once, and gains nothing.

    How many samples there are is not asked: an exported network leaves it open.
    """
    size = math.prod(weight[3:])
    if is_depthwise(weight, groups):
        return training or weight[1] * (size - left) >= LEAST_SAVED
    return left <= MOST_LEFT * size
