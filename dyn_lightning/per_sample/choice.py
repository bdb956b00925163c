"""Which method of the per-sample convolution is taken where, by a model of their costs."""

import math
from typing import NamedTuple

from dyn_lightning.per_sample.by_name import has_triton
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.methods import FEW_POSITIONS
from dyn_lightning.per_sample.mixed import MOST_POSITIONS

# Where freed memory is not kept, a larger tensor than about this is fetched from the system, page by page, each time,
# and chunks are faster. With a backward pass they mix the kernels twice, K multiply-adds a weight: from so many bytes
# of these times K on, or of both maps together.
FETCHED_BYTES, MIXED_BYTES_BY_K, MAPS_BYTES = 40 << 20, 9 << 20, 32 << 20
# Numbers of one image's output and of all mixed kernels from which a product or a convolution of torch's is slower for
# each of them (1 MiB and 32 MiB of float32: beyond caches of level 2 and 3). Choices by these lose the least time.
LARGE_MAP, LARGE_KERNELS = 1 << 18, 1 << 23
# Numbers of one image's unfolded input up to which torch's depthwise convolution takes longer to begin than a product.
FEW_PATCHES = 60_000


class Costs(NamedTuple):
    """Picoseconds of each part of the work: of mixing the kernels first, of mixing all kernels' outputs, of our C++,
    which is not taken where none are known.
    """

    mixed_first: tuple[float, ...]
    mixture: tuple[float, ...]
    cpp: tuple[float, ...] = ()

    def best(self, case: Case, first: str, within: list[str]) -> str:
        """Name the method with the least cost, of those that hold no more than is allowed.

        Args:
            case: what is to be computed.
            first: the fastest method that mixes the kernels first.
            within: names of the methods that hold no more than is allowed.
        """
        others = {"mixture": (self.mixture, mixture_work), "cpp": (self.cpp, cpp_work)}
        numbers, work = others.pop(first, (self.mixed_first, mixed_first_work))
        best, least = first, _sum(numbers, work(case))
        for name, (numbers, work) in others.items():
            # With an open batch a compiler understands a comparison, but not `min` with a key.
            if name in within and numbers and (cost := _sum(numbers, work(case))) < least:
                best, least = name, cost
        return best


def mixed_first_work(case: Case) -> tuple[int, ...]:
    """Count weights of the B mixed kernels, what these are mixed of, multiply-adds, the call of a product, what goes
    into one, what comes out, the first again where a product has few columns, which it is slow with (but not with a
    vector), and what of kernels and outputs does not stay in caches.

    The call of a convolution is not counted: those that were measured take so long that it cannot be told. Nor is what
    goes in elsewhere, or forward of one image: choices do not become better by it.
    """
    mixed, outputs, call = case.mixed_weights(), case.outputs(), int(case.is_product())
    few = mixed if case.positions() <= FEW_POSITIONS and not case.is_single() else 0
    large = outputs if case.weight[1] * case.positions() >= LARGE_MAP else 0
    large += mixed if mixed >= LARGE_KERNELS else 0
    inputs = math.prod(case.input) if call and (case.training or case.input[0] > 1) else 0
    return mixed, case.weight[0] * mixed, case.multiply_adds(), call, inputs, outputs, few, large


def mixture_work(case: Case) -> tuple[int, ...]:
    """Count multiply-adds of the convolution with all K kernels, their weights, what they give, and the call."""
    kernels = case.weight[0]
    return kernels * case.multiply_adds(), math.prod(case.weight), kernels * case.outputs(), 1


def cpp_work(case: Case) -> tuple[int, ...]:
    """Count weights of the B mixed kernels, what these are mixed of, multiply-adds, the call, and numbers of contiguous
    maps: they are turned, or, of a product, waited for.
    """
    mixed, outputs = case.mixed_weights(), case.outputs()
    numbers = 2 * outputs + math.prod(case.input) if case.training else outputs
    return mixed, case.weight[0] * mixed, case.multiply_adds(), 1, 0 if case.channels_last else numbers


Kind = tuple[bool, bool, str]


def _sum(costs: tuple[float, ...], work: tuple[int, ...]) -> float:
    return sum(cost * count for cost, count in zip(costs, work, strict=True))


# By (whether a sample's convolution is one matrix product, whether there is a backward pass, of how many images).
# Fitted by `experiments.benchmarks.dynamic_conv.fit_costs` to the files `layers.json` and `layers_k16.json` in
# `experiments/benchmarks/results/other`: two cores of an EPYC of AMD's (AVX-512), float32 (the same numbers serve the
# other types), K = 4 and 16, contiguous maps, freed memory kept.
OTHER_COSTS = {
    (True, True, "several"): Costs(
        (1410, 32.2, 32.9, 89.8e6, 447, 403, 1070, 745),
        (40.2, 734, 1870, 565e6),
        (182, 267, 29.3, 297e6, 168),
    ),
    (True, False, "several"): Costs(
        (357, 27.3, 14.4, 47e6, 134, 100, 462, 0),
        (12.9, 346, 1040, 80.5e6),
        (37.4, 31.6, 12.3, 48.2e6, 57.6),
    ),
    (True, False, "one"): Costs(
        (157, 154, 13.4, 33.7e6, 0, 484, 0, 0),
        (10.3, 395, 776, 44.1e6),
        (0, 40.9, 11.8, 28.3e6, 101),
    ),
    (True, False, "one, few positions"): Costs(
        (0, 115, 28.5, 29.4e6, 0, 47.9, 594, 0),
        (13.3, 95.2, 957, 32.7e6),
        (0, 48.7, 16.8, 24.6e6, 0),
    ),
    (False, True, "several"): Costs(
        (1650, 53.3, 44.6, 0, 0, 939, 0, 0),
        (29.9, 1370, 0, 2070e6),
        (0, 186, 23.1, 1670e6, 615),
    ),
    (False, False, "several"): Costs(
        (957, 13, 4.74, 0, 0, 1550, 0, 0),
        (14.3, 653, 511, 102e6),
        (0, 59.1, 6.87, 0, 0),
    ),
    (False, False, "one"): Costs(
        (1050, 150, 8.93, 0, 0, 1850, 0, 0),
        (9.65, 281, 186, 625e6),
        (70.4, 959, 6.88, 0, 5360),
    ),
    (False, False, "one, few positions"): Costs(
        (453, 126, 18.7, 0, 0, 26400, 719, 0),
        (14.7, 160, 0, 37.7e6),
        (0, 66.3, 18.6, 0, 12300),
    ),
}
# The same of two cores of a Xeon of Intel's with AVX-512, from the files of these names and `layers_again.json` in
# `results/intel`, and from `one.json`, `one_again.json` and `one_k16.json` for one image.
INTEL_COSTS = {
    (True, True, "several"): Costs(
        (1290, 0, 16.7, 189e6, 700, 732, 172, 730),
        (22.3, 310, 2120, 583e6),
        (502, 160, 27.9, 890e6, 316),
    ),
    (True, False, "several"): Costs(
        (310, 1.21, 4.68, 26.9e6, 112, 145, 168, 152),
        (7.24, 140, 544, 163e6),
        (44.9, 44.3, 8.61, 63.1e6, 120),
    ),
    (True, False, "one"): Costs(
        (57.4, 129, 8.32, 43.3e6, 0, 116, 0, 42.1),
        (7.62, 98.2, 318, 65.4e6),
        (0, 105, 13.1, 57.9e6, 178),
    ),
    (True, False, "one, few positions"): Costs(
        (11.6, 101, 8.64, 17.8e6, 0, 360, 378, 0),
        (8.32, 104, 414, 40.8e6),
        (0, 63.5, 9.91, 27.4e6, 376),
    ),
    (False, True, "several"): Costs(
        (1980, 6.93, 26.4, 0, 0, 1870, 0, 187),
        (24.2, 546, 0, 2340e6),
        (189, 276, 19.6, 436e6, 716),
    ),
    (False, False, "several"): Costs(
        (728, 4.25, 5.9, 0, 0, 124, 0, 38.4),
        (6.04, 296, 187, 738e6),
        (43.3, 59.9, 7.13, 62e6, 162),
    ),
    (False, False, "one"): Costs(
        (820, 117, 5.77, 0, 0, 1990, 0, 0),
        (5.7, 441, 579, 251e6),
        (0, 974, 2.78, 0, 5160),
    ),
    (False, False, "one, few positions"): Costs(
        (221, 128, 9.93, 0, 0, 16000, 430, 0),
        (15, 101, 0, 77e6),
        (0, 93.2, 10.5, 36.9e6, 1710),
    ),
}
# No GPU has been measured. From an H100's data sheet: 3.35 TB/s for each pass over 4-byte numbers, and a tensor core's
# product where a product is large; samples as groups are taken to be five times slower. `benchmark` needs none of it.
CUDA_COSTS = {
    (True, True, "several"): Costs((7, 0, 0.015, 0, 0, 0, 0, 0), (0.015, 7, 7, 0)),
    (True, False, "several"): Costs((2.4, 0, 0.005, 0, 0, 0, 0, 0), (0.005, 2.4, 2.4, 0)),
    (False, True, "several"): Costs((7, 0, 0.075, 0, 0, 0, 0, 0), (0.015, 7, 7, 0)),
    (False, False, "several"): Costs((2.4, 0, 0.025, 0, 0, 0, 0, 0), (0.005, 2.4, 2.4, 0)),
}


def choose(case: Case) -> str:
    """Name the method with the least cost, from shapes, type, kind of device, whether the CPU is Intel's, and whether
    the process keeps freed memory and has our C++, alone: all DDP ranks on equal machines take the same.
    """
    if case.exported == "strict":  # a comparison would close what is left open of the batch
        return "matmul" if case.is_product() else "grouped"
    if case.input[0] == 0:
        return "mixture"  # a convolution cannot have 0 groups
    within = methods_within(case)
    first = first_within(case, within)
    kind, costs = kind_of(case), costs_of(case)
    if case.is_depthwise() or kind not in costs:  # depthwise kernels are mixed with K times fewer multiply-adds
        return first
    if case.channels_last and case.input[0] > 1 and not case.is_product() and "cpp" in within:
        first = "cpp"  # of maps as they are, where a convolution with the samples as groups copies them
    return costs[kind].best(case, first, within)


def first_within(case: Case, within: list[str]) -> str:
    """Name the fastest method that mixes the kernels first and holds no more than is allowed.

    Args:
        case: what is to be computed.
        within: ``methods_within`` of it.
    """
    first = mixed_first(case)
    if first in within:
        return first
    return next(iter(within), first) if case.exported else "chunked"  # what others run without us has no chunks of ours


def costs_of(case: Case) -> dict[Kind, Costs]:
    """Give the costs of all kinds where a case is computed."""
    if case.device != "cpu":
        return CUDA_COSTS
    return INTEL_COSTS if case.intel else OTHER_COSTS


def kind_of(case: Case) -> Kind:
    """Say which costs a case has."""
    images = "several" if case.input[0] > 1 else "one" if case.positions() > MOST_POSITIONS else "one, few positions"
    return case.is_product(), case.training, images


def mixed_first(case: Case) -> str:
    """Name the fastest method that mixes the kernels first, all at once or a few samples at a time."""
    if case.input[0] == 1:
        return "matmul" if case.is_product() or (case.is_depthwise() and multiplies_one(case)) else "grouped"
    if case.device == "cpu" and chunks_are_faster(case):
        return "chunked"
    one_weight = math.prod(case.weight[2:]) == 1 and case.positions() <= FEW_POSITIONS  # what is left of depthwise ones
    return "matmul" if case.is_product() or one_weight or case.unfolds() else "grouped"


def chunks_are_faster(case: Case) -> bool:
    """Tell whether mixing all at once makes such large tensors that chunks, which do not, are faster."""
    if case.keeps_memory or case.is_ours() or case.exported:
        return False  # chunks save fetching memory from the system, and mix a second time; others have no chunks
    mixed = case.bytes_of(case.mixed_weights())
    # A product reads and writes the maps where they belong.
    maps = [0, 0] if case.is_product() else [case.bytes_of(n) for n in (math.prod(case.input), case.outputs())]
    if case.training:
        return mixed >= MIXED_BYTES_BY_K * case.weight[0] or sum(maps) >= MAPS_BYTES
    return max(mixed, *maps) >= FETCHED_BYTES


def multiplies_one(case: Case) -> bool:
    """Tell whether one image's depthwise convolution takes longer to begin than a product with the unfolded image."""
    if case.device == "cpu" and not case.exported and (case.channels_last or case.is_ours()):
        return False
    return case.patches() <= FEW_PATCHES


def methods_within(case: Case) -> list[str]:
    """Name the methods that serve and hold no more than is allowed; chunks, of which an export has none, can always be
    small enough.
    """
    found = [
        name
        for name, numbers in case.held().items()
        if _serves(name, case) and case.bytes_of(numbers) <= case.allowed()
    ]
    return found if case.exported else [*found, "chunked"]


def _serves(name: str, case: Case) -> bool:
    if name == "cpp":
        return not case.exported and case.is_mixed_in_cpp()
    return name != "triton" or (case.device == "cuda" and has_triton() and not case.exported)
