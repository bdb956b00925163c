"""All that the choice of a method depends on, and what follows from it: what there is to compute and to hold."""

import math
from typing import NamedTuple

import torch

from dyn_lightning.per_sample.depthwise import serves
from dyn_lightning.per_sample.geometry import Geometry, is_depthwise, positions
from dyn_lightning.per_sample.methods import are_few, mixes_rows, multiplies
from dyn_lightning.per_sample.mixed import numbers_held, why_not
from dyn_lightning.per_sample.processor import is_intel
from dyn_lightning.per_sample.reduction import Plan

# Positions of the output up to which unfolding the input takes less time than laying out B mixed kernels to convolve:
# this many, or this part of the output channels.
SMALL_MAP, SMALL_PART = 16, 1 / 4
TILE = 32  # channels of a tile of Triton's kernels
# Bytes that a layer may hold beside its input, kernels and output, with their gradients, where its method is chosen.
MAX_MIXED_BYTES = 256 << 20


class Case(NamedTuple):
    """All that a choice depends on. Without properties: to the compiler of torch 2.8 a named tuple has none."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    dtype: torch.dtype
    device: str
    channels_last: bool
    dense: bool  # whether the input is contiguous or channels_last
    training: bool
    max_mixed_bytes: int
    keeps_memory: bool  # whether memory that is freed stays with the process
    intel: bool  # whether it is computed on a processor of Intel's
    exported: str = ""  # "strict" or "traced", while a network is exported

    def bytes_of(self, numbers: int) -> int:
        """Bytes that so many numbers take."""
        return numbers * self.dtype.itemsize

    def allowed(self) -> int:
        """Bytes that may be held in the forward pass: half in training, since the gradients take as much again."""
        return self.max_mixed_bytes // 2 if self.training else self.max_mixed_bytes

    def is_product(self) -> bool:
        """Whether a sample's convolution is one matrix product."""
        return multiplies(self.weight, self.geometry)

    def is_depthwise(self) -> bool:
        """Whether each group has one input channel."""
        return is_depthwise(self.weight, self.geometry.groups)

    def is_ours(self) -> bool:
        """Whether it is a depthwise convolution that is computed in C++."""
        if self.device != "cpu" or not self.dense or not self.is_depthwise():
            return False
        kernels = (self.input[0] * self.weight[1], *self.weight[2:])
        layout = "channels_last" if self.channels_last else "contiguous"
        return serves(self.input, kernels, self.geometry, self.dtype, layout)

    def is_mixed_in_cpp(self) -> bool:
        """Whether our C++ can compute it with kernels that it mixes block by block."""
        return not why_not(self.input, self.weight, self.geometry, self.dtype, self.device, self.channels_last)

    def unfolds(self) -> bool:
        """Whether products with the unfolded input are faster than a convolution with the samples as its groups."""
        most = max(SMALL_MAP, SMALL_PART * self.weight[1])
        return self.geometry.groups == 1 and not self.is_product() and self.positions() <= most

    def bytes_of_rows(self) -> int:
        """Bytes that chunks of the unfolded input hold beside the chunks: the input, and an output to be laid out."""
        return self.bytes_of(self.held_unfolded() + (self.outputs() if self.channels_last else 0))

    def has_room_for_rows(self) -> bool:
        """Whether chunks are taken of the unfolded input: with as much room again for the chunks."""
        if self.exported == "strict" or self.input[0] == 1:  # a comparison would close what is left open of the batch
            return False
        return self.unfolds() and 2 * self.bytes_of_rows() <= self.allowed()

    def positions(self) -> int:
        """Positions of the output."""
        return math.prod(positions(self.input, self.weight, self.geometry))

    def is_single(self) -> bool:
        """Whether it is of one image and one position."""
        return self.input[0] == 1 and self.positions() == 1  # in this order: a comparison may close an open batch

    def mixed_weights(self) -> int:
        """Weights of the B mixed kernels."""
        return self.input[0] * math.prod(self.weight[1:])

    def multiply_adds(self) -> int:
        """Multiply-adds of a static convolution."""
        return self.mixed_weights() * self.positions()

    def outputs(self) -> int:
        """Numbers that a static convolution gives."""
        return self.input[0] * self.weight[1] * self.positions()

    def patches(self) -> int:
        """Numbers of the unfolded input, none where it can be multiplied as it is."""
        if self.is_product():
            return 0 if self.dense else math.prod(self.input)
        return self.input[0] * self.input[1] * math.prod(self.weight[3:]) * self.positions()

    def held_unfolded(self) -> int:
        """Numbers that the unfolded input takes, and for a while its unfolding."""
        return self.patches() if self.is_product() else self.patches() + math.prod(self.input)

    def held(self) -> dict[str, int]:
        """Numbers that each method but chunks holds at once, beside input, kernels and output."""
        pixels, outputs, mixed = math.prod(self.input), self.outputs(), self.mixed_weights()
        copied = 0 if self.dense else pixels  # by whatever wants a layout
        unfolded = self.held_unfolded()
        if are_few(self.positions(), self.intel) and not (self.is_product() and self.channels_last):
            # They are laid out side by side.
            unfolded += pixels if self.is_product() else self.patches()
        mixture = self.weight[0] * outputs
        if mixes_rows(self.weight, self.geometry, self.positions()):
            mixture += pixels + copied if self.is_product() else 2 * self.patches() + pixels
        else:  # the outputs are brought in the kernels' order where they do not come in it
            mixture *= 2 if self.geometry.groups > 1 or self.channels_last else 1
            mixture += copied + (math.prod(self.weight) if self.geometry.groups > 1 else 0)  # and so are those
        others = {
            "mixture": mixture,
            "cpp": numbers_held(self.input, self.weight, self.geometry, self.training, not self.channels_last) + copied,
            "triton": self.held_by_triton(),
        }
        if not self.channels_last or self.is_ours():
            return {"grouped": mixed + copied, "matmul": mixed + unfolded, **others}
        # What comes out contiguous is copied; a product's K kernels are transposed.
        again = outputs if not self.is_product() else math.prod(self.weight) if self.training else 0
        grouped = mixed + min(mixed, math.prod(self.weight)) + pixels + outputs  # all K, to be mixed in this layout
        return {"grouped": grouped, "matmul": mixed + unfolded + again, **others}

    def held_by_triton(self) -> int:
        """Numbers that Triton's kernels hold: maps in another layout, the K kernels in another order, and in training
        their gradients in that order, of 16 bits in float32, and in both orders, and each tile's share of the routing
        weights' gradients. Half of what training takes, which twice as much is allowed for.
        """
        held = math.prod(self.weight) + (0 if self.dense and not self.channels_last else math.prod(self.input))
        held += self.outputs() if self.channels_last else 0
        if not self.training:
            return held
        wide = max(1, torch.float32.itemsize // self.dtype.itemsize)
        groups, (kernels, out_channels, in_channels, *size) = self.geometry.groups, self.weight
        tiles = groups * -(-(out_channels // groups) // TILE) * -(-in_channels // TILE)
        parts = math.prod(size) * tiles * self.input[0] * kernels
        gradients = wide * (math.prod(self.weight) + parts) + (wide * math.prod(self.weight) if wide > 1 else 0)
        return -(-(held + gradients) // 2)


def case_of(
    plan: Plan,
    layout: str,
    dtype: torch.dtype,
    device: str,
    training: bool = True,
    max_mixed_bytes: int = MAX_MIXED_BYTES,
    keeps_memory: bool = False,
    exported: str = "",
) -> Case:
    """Say all that the choice of a method depends on, of a convolution brought to the least that is to be computed."""
    # Padded, a map is dense; without the pixels that no kernel sees, only where it is copied to be channels_last.
    dense = layout == "channels_last" or (plan.step == (1, 1) and (layout == "contiguous" or bool(plan.zeros)))
    images, kernels = plan.input, plan.weight
    if exported == "traced":
        images, kernels = _hints(images), _hints(kernels)
    last = layout == "channels_last"
    on_cpu = device == "cpu"
    rest = (dtype, device, last, dense, training, max_mixed_bytes, on_cpu and keeps_memory, on_cpu and is_intel())
    return Case(images, kernels, plan.geometry, *rest, exported)


def _hints(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give an export's open sizes the values of its example, since a choice by the open ones would fix them."""
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in shape)
