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
    remembered,
)
from dyn_lightning.per_sample.operation import is_transformed


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

# Bytes that a layer may take for mixed kernels, or for the outputs of all K kernels, where its method is chosen for it.
MAX_MIXED_BYTES = 256 << 20
# On a CPU a chunk's kernels, input and output should stay in the cache.
CACHED_BYTES = 8 << 20
# The largest tensor that memory allocators keep for the next call: a larger one is fetched from the system, page by
# page, each time. Chunks are faster from about there on.
KEPT_BYTES = 32 << 20
# The mixture has to be so many times as fast, since it holds the outputs of all K kernels.
WORTH_IT = 1.1
# Positions of one sample's output up to which a product takes less time than to begin a convolution.
SMALL_MAP = 16


class Case(NamedTuple):
    """All that a choice depends on."""

    input: torch.Size
    weight: torch.Size
    geometry: Geometry
    bytes_each: int
    device: str
    channels_last: bool
    training: bool
    max_mixed_bytes: int

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
        """Numbers of the unfolded input."""
        return 0 if self.is_product else self.input[0] * self.input[1] * math.prod(self.weight[3:]) * self.positions

    @property
    def made_anew(self) -> int:
        """Numbers of the largest tensors that mixing first makes, and chunks do not."""
        if self.is_product:  # both write the maps where they belong; chunks mix twice, K multiply-adds a weight
            return 8 * self.mixed_weights // self.weight[0]
        maps = (math.prod(self.input), self.outputs)
        return max(sum(maps) if self.training else max(maps), self.mixed_weights)

    @property
    def mixture_numbers(self) -> int:
        """Numbers that the mixture holds: outputs of K kernels, and the input where it is unfolded."""
        few = self.geometry.groups == 1 and self.positions <= FEW_POSITIONS
        return max(self.weight[0] * self.outputs, self.patches if few else 0)


def case_of(input: Tensor, weight: Tensor, geometry: Geometry, training: bool, max_mixed_bytes: int) -> Case:
    """Say all that the choice of a method depends on."""
    where = (input.element_size(), input.device.type, is_channels_last(input))
    return Case(_hints(input.shape), _hints(weight.shape), geometry, *where, training, max_mixed_bytes)


def _hints(shape: torch.Size) -> torch.Size:
    """Give an export's open sizes the values of its example, since a choice by the open ones would fix them."""
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return shape
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
# Fitted by `experiments.benchmarks.fit_costs` to three runs on two x86-64 cores, with K = 4, 4 and 16.
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
    if case.input[0] == 0:
        return "mixture"  # a convolution cannot have 0 groups
    first = mixed_first(case)
    # One sample always has its kernels mixed: that is the papers' cost, K times fewer multiply-adds.
    too_much = case.mixture_numbers * case.bytes_each > case.max_mixed_bytes
    if case.input[0] == 1 or case.is_depthwise or too_much:
        return first
    costs = CPU_COSTS if case.device == "cpu" else CUDA_COSTS
    return "mixture" if costs[case.is_product, case.training].prefer_mixture(case) else first


def mixed_first(case: Case) -> str:
    """Name the fastest method that mixes the kernels first, all at once or a few samples at a time."""
    kernels = case.mixed_weights * case.bytes_each
    if kernels > case.max_mixed_bytes:
        return "chunked"
    if case.input[0] == 1:
        return "matmul" if case.is_product or case.positions <= SMALL_MAP else "grouped"
    made_anew = case.made_anew * case.bytes_each > KEPT_BYTES
    if case.device == "cpu" and (made_anew or (case.is_depthwise and case.channels_last)):
        return "chunked"
    one_weight = math.prod(case.weight[2:]) == 1 and case.positions <= FEW_POSITIONS  # what is left of depthwise ones
    return "matmul" if case.is_product or one_weight else "grouped"


def run(method: str, input: Tensor, routing: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Compute by a method; ``"chunked"`` gets the bytes that it may take."""
    if method != "chunked":
        return METHODS[method](input, routing, weight, case.geometry)
    # The backward pass holds a chunk's kernels and maps, and their gradients.
    limit = case.max_mixed_bytes // 2 if case.training else case.max_mixed_bytes
    return chunked(input, routing, weight, case.geometry, min(CACHED_BYTES, limit) if case.device == "cpu" else limit)


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


def methods_within(case: Case) -> list[str]:
    """Name the methods whose mixed kernels, unfolded input or outputs of K kernels keep within ``max_mixed_bytes``."""
    numbers = {
        "grouped": case.mixed_weights,
        "matmul": max(case.mixed_weights, case.patches),
        "mixture": case.mixture_numbers,
    }
    found = [name for name, count in numbers.items() if count * case.bytes_each <= case.max_mixed_bytes]
    return [*found, "chunked", *(["triton"] if case.device == "cuda" and has_triton() else [])]


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
