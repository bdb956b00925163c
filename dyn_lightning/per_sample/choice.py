"""Which method of the per-sample convolution is taken where: by a model of their costs, or by timing them."""

import importlib.util
import math
import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dyn_lightning.per_sample.chunked import chunked
from dyn_lightning.per_sample.methods import (
    FEW_POSITIONS,
    Geometry,
    Method,
    grouped,
    is_channels_last,
    is_depthwise,
    matmul,
    mixture,
    multiplies,
    positions,
)
from dyn_lightning.per_sample.tracing import in_strict_export, is_transformed, remembered


def triton(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix tiles of the kernels where they are used, in kernels of Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests, on any device
    if not (has_triton() and (input.is_cuda or interpreted)):
        others = [name for name in METHODS if METHODS[name] is not triton]
        raise ValueError(
            f"method='triton' needs a CUDA device and the package triton, not {input.device}: take {others}"
        )
    from dyn_lightning.per_sample.triton_kernels import convolve

    return convolve(input, routing, weight, geometry)


def has_triton() -> bool:
    """Tell whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


METHODS: dict[str, Method] = {
    "grouped": grouped,
    "matmul": matmul,
    "mixture": mixture,
    "chunked": chunked,
    "triton": triton,
}

CHOICES = ("auto", "benchmark", *METHODS)

# Bytes that a layer may take for mixed kernels, or for the outputs of all K kernels, and for the gradients of these,
# where its method is chosen for it.
MAX_MIXED_BYTES = 256 << 20
# On a CPU a chunk's kernels, input and output should stay in the cache.
CACHED_BYTES = 8 << 20
# The largest tensor that memory allocators keep for the next call: a larger one is fetched from the system, page by
# page, each time. Chunks are faster from about there on.
KEPT_BYTES = 32 << 20
# The mixture has to be so many times as fast, since it holds the outputs of all K kernels.
WORTH_IT = 1.15
# Numbers of one sample's unfolded input up to which its product takes less time than to begin a convolution.
FEW_PATCHES = 100_000


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
    def made_anew(self) -> int:
        """Numbers of the largest tensors that mixing first makes, and chunks do not."""
        if self.is_product:  # both write the maps where they belong
            if not self.training:
                return 2 * self.mixed_weights
            return 4 * self.mixed_weights // self.weight[0]  # chunks mix again, K multiply-adds a weight
        maps = (math.prod(self.input), self.outputs)
        return max(sum(maps) if self.training else max(maps), self.mixed_weights)

    @property
    def mixture_numbers(self) -> int:
        """Numbers that the mixture holds: outputs of K kernels, twice with groups, and the input's rows."""
        outputs = self.weight[0] * self.outputs
        if self.geometry.groups > 1:
            return 2 * outputs
        if self.is_product:
            return outputs + math.prod(self.input)
        return outputs + (2 * self.patches if self.positions <= FEW_POSITIONS else 0)


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


class Costs(NamedTuple):
    """Picoseconds. Where kernels are mixed first: per weight of the B mixed kernels, and per multiply-add. Where all K
    kernels convolve: per multiply-add, per weight of the K kernels, and per number that they give.
    """

    per_mixed_weight: float
    per_multiply_add: float
    per_mixture_multiply_add: float
    per_weight: float
    per_output: float

    def prefer_mixture(self, case: Case) -> bool:
        """Tell whether convolving with all K kernels costs less than mixing them first."""
        mixed_first = self.per_mixed_weight * case.mixed_weights + self.per_multiply_add * case.multiply_adds
        one = self.per_mixture_multiply_add * case.multiply_adds + self.per_output * case.outputs
        return WORTH_IT * (case.weight[0] * one + self.per_weight * math.prod(case.weight)) < mixed_first


# By (whether a sample's convolution is one matrix product, whether there is a backward pass).
# Fitted by `experiments.benchmarks.dynamic_conv.fit_costs` to three runs on two x86-64 cores, with K = 4, 4 and 16,
# which are not kept.
CPU_COSTS = {
    (True, True): Costs(3090, 56, 38, 1600, 3740),
    (True, False): Costs(1070, 17.5, 15.4, 590, 1050),
    (False, True): Costs(5540, 39, 33, 5100, 6310),
    (False, False): Costs(1250, 11.5, 8.6, 1730, 1730),
}
# No GPU has been measured. From an H100's data sheet: 3.35 TB/s for each pass over 4-byte numbers, and a tensor core's
# product where a product is large; samples as groups are taken to be five times slower. `benchmark` needs none of it.
CUDA_COSTS = {
    (True, True): Costs(7, 0.015, 0.015, 7, 7),
    (True, False): Costs(2.4, 0.005, 0.005, 2.4, 2.4),
    (False, True): Costs(7, 0.075, 0.015, 7, 7),
    (False, False): Costs(2.4, 0.025, 0.005, 2.4, 2.4),
}


@remembered
def choose(case: Case) -> str:
    """Name the method with the least cost, from shapes, type and kind of device alone: all DDP ranks take the same."""
    if in_strict_export():  # a comparison would close what is left open of the batch
        return "matmul" if case.is_product else "grouped"
    if case.input[0] == 0:
        return "mixture"  # a convolution cannot have 0 groups
    within, first = methods_within(case), mixed_first(case)
    first = first if first in within else "chunked"
    # One sample always has its kernels mixed: that is the papers' cost, K times fewer multiply-adds.
    if case.input[0] == 1 or case.is_depthwise or "mixture" not in within:
        return first
    costs = CPU_COSTS if case.device == "cpu" else CUDA_COSTS
    return "mixture" if costs[case.is_product, case.training].prefer_mixture(case) else first


def mixed_first(case: Case) -> str:
    """Name the fastest method that mixes the kernels first, all at once or a few samples at a time."""
    if case.input[0] == 1:
        return "matmul" if case.is_product or case.patches <= FEW_PATCHES else "grouped"
    made_anew = case.made_anew * case.bytes_each >= KEPT_BYTES
    if case.device == "cpu" and (made_anew or (case.is_depthwise and case.channels_last)):
        return "chunked"
    one_weight = math.prod(case.weight[2:]) == 1 and case.positions <= FEW_POSITIONS  # what is left of depthwise ones
    return "matmul" if case.is_product or one_weight else "grouped"


def methods_within(case: Case) -> list[str]:
    """Name the methods whose mixed kernels, unfolded input or outputs of K kernels keep within what is allowed."""
    copied = 0 if case.dense and not case.channels_last else math.prod(case.input)  # to put the batch into the groups
    numbers = {
        "grouped": max(case.mixed_weights, copied),
        "matmul": max(case.mixed_weights, case.patches),
        "mixture": case.mixture_numbers,
    }
    found = [name for name, count in numbers.items() if count * case.bytes_each <= case.allowed]
    return [*found, "chunked", *(["triton"] if case.device == "cuda" and has_triton() else [])]


def run(method: str, input: Tensor, routing: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Compute by a method; ``"chunked"`` gets the bytes that it may take."""
    if method != "chunked":
        return METHODS[method](input, routing, weight, case.geometry)
    limit = min(CACHED_BYTES, case.allowed) if case.device == "cpu" else case.allowed
    return chunked(input, routing, weight, case.geometry, limit)


# What `fastest` found, by all that a time depends on.
MEASURED: dict[tuple[Any, ...], str] = {}


def fastest(input: Tensor, routing: Tensor, weight: Tensor, case: Case) -> str:
    """Time the methods that keep within ``max_mixed_bytes``, once a case, and remember the fastest.

    DDP ranks may find different ones, of equal value. Inputs of many sizes are many cases.
    """
    if isinstance(input, FakeTensor) or input.device.type == "meta" or is_transformed():
        return choose(case)  # there is nothing to time
    key = (case, input.device, input.dtype, torch.get_num_threads())
    if key not in MEASURED:
        # Nothing around may see these runs: activation checkpoints, offloading, counters of operations.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
        with torch.inference_mode(False), torch.set_grad_enabled(case.training), hooks, _disable_current_modes():
            tensors = [tensor.detach().clone().requires_grad_(case.training) for tensor in (input, routing, weight)]
            times = {method: _milliseconds(method, tensors, case) for method in methods_within(case)}
        MEASURED[key] = min(times, key=lambda name: times[name])
    return MEASURED[key]


def _milliseconds(method: str, tensors: list[Tensor], case: Case) -> float:
    input, routing, weight = tensors
    times = []
    for _ in range(4):
        start = time.perf_counter()
        output = run(method, input, routing, weight, case)
        if case.training:
            torch.autograd.grad(output, tensors, torch.ones_like(output))
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
