"""Which method of the per-sample convolution is taken where, by a model of their costs."""

import math
from typing import NamedTuple

from dyn_lightning.per_sample.by_name import has_triton
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.methods import FEW_POSITIONS
from dyn_lightning.per_sample.tracing import in_export, in_strict_export

# Where freed memory is not kept, a larger tensor than about this is fetched from the system, page by page, each time,
# and chunks are faster. With a backward pass they mix the kernels twice, K multiply-adds a weight: from so many bytes
# of these times K on, or of both maps together.
FETCHED_BYTES, MIXED_BYTES_BY_K, MAPS_BYTES = 40 << 20, 9 << 20, 32 << 20
# Numbers of one image's unfolded input up to which torch's depthwise convolution takes longer to begin than a product.
FEW_PATCHES = 60_000


class Costs(NamedTuple):
    """Picoseconds of each part of the work: of mixing the kernels first, of mixing all kernels' outputs, of our C++."""

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
            if name in within and (cost := _sum(numbers, work(case))) < least:
                best, least = name, cost
        return best


def mixed_first_work(case: Case) -> tuple[int, ...]:
    """Count weights of the B mixed kernels, what these are mixed of, multiply-adds, the call of a product, what comes
    out, and the first again where a product has few columns, which it is slow with.

    The call of a convolution is not counted: those that were measured take so long that it cannot be told.
    """
    mixed, product, few = case.mixed_weights(), case.is_product(), case.positions() <= FEW_POSITIONS
    return mixed, case.weight[0] * mixed, case.multiply_adds(), int(product), case.outputs(), mixed if few else 0


def mixture_work(case: Case) -> tuple[int, ...]:
    """Count multiply-adds of the convolution with all K kernels, their weights, what they give, and the call."""
    kernels = case.weight[0]
    return kernels * case.multiply_adds(), math.prod(case.weight), kernels * case.outputs(), 1


def cpp_work(case: Case) -> tuple[int, ...]:
    """Count weights of the B mixed kernels, what these are mixed of, multiply-adds, the call, and the numbers of maps
    that are turned.
    """
    mixed, outputs = case.mixed_weights(), case.outputs()
    turned = 2 * outputs + math.prod(case.input) if case.training else outputs
    return mixed, case.weight[0] * mixed, case.multiply_adds(), 1, 0 if case.channels_last else turned


Kind = tuple[bool, bool, str]


def _sum(costs: tuple[float, ...], work: tuple[int, ...]) -> float:
    return sum(cost * count for cost, count in zip(costs, work, strict=True))


# By (whether a sample's convolution is one matrix product, whether there is a backward pass, of how many images).
# Fitted by `experiments.benchmarks.dynamic_conv.fit_costs` to the files `layers.json`, `layers_again.json` and
# `layers_k16.json` in `experiments/benchmarks/results/other`: two cores of an x86-64 processor that is not Intel's,
# float32 (the same numbers serve the other types), K = 4 and 16, contiguous maps, freed memory kept.
OTHER_COSTS = {
    (True, True, "several"): Costs(
        (2160, 10.3, 28.8, 108e6, 244, 2100),
        (37.2, 592, 2960, 709e6),
        (230, 339, 15.5, 358e6, 97.6),
    ),
    (True, False, "several"): Costs(
        (584, 7.17, 6.39, 27.5e6, 92.2, 1180),
        (29.4, 233, 687, 91.3e6),
        (42.1, 81.4, 3.97, 21.6e6, 72.9),
    ),
    (True, False, "one"): Costs(
        (638, 51.8, 9.69, 13.5e6, 432, 0),
        (9.7, 91.8, 398, 25e6),
        (0, 1730, 6.67, 20.6e6, 79.2),
    ),
    (False, True, "several"): Costs(
        (3090, 48.4, 21.1, 0, 3360, 483),
        (42.8, 1170, 0, 1010e6),
        (4.79, 403, 14.5, 392e6, 62),
    ),
    (False, False, "several"): Costs(
        (997, 11.8, 4.71, 0, 258, 38.4),
        (21.3, 504, 607, 87.9e6),
        (0, 67.6, 5.65, 13.4e6, 0),
    ),
    (False, False, "one"): Costs(
        (884, 85.2, 7.11, 0, 545, 71.8),
        (21.7, 97, 0, 31.1e6),
        (0, 1050, 11.9, 0, 1910),
    ),
}
# The same of two cores of a Xeon of Intel's with AVX-512, from `layers.json` and `layers_k16.json` in `results/intel`.
INTEL_COSTS = {
    (True, True, "several"): Costs(
        (927, 16.2, 15.8, 125e6, 472, 213),
        (19.6, 345, 1810, 370e6),
        (149, 264, 37.1, 368e6, 287),
    ),
    (True, False, "several"): Costs(
        (173, 8.8, 5, 13.8e6, 68.3, 194),
        (7.41, 139, 485, 107e6),
        (0, 56.3, 13.5, 20.8e6, 67.3),
    ),
    (True, False, "one"): Costs(
        (0, 104, 6.21, 10.5e6, 75.9, 0),
        (21.3, 35, 255, 27.9e6),
        (0, 827, 10.6, 25.1e6, 131),
    ),
    (False, True, "several"): Costs(
        (2800, 19.3, 16.1, 0, 0, 152),
        (29.1, 437, 0, 3000e6),
        (0, 394, 8.6, 250e6, 350),
    ),
    (False, False, "several"): Costs(
        (948, 8.87, 2.38, 0, 67.8, 53.7),
        (9.11, 243, 168, 590e6),
        (6.07, 102, 4.09, 0, 0),
    ),
    (False, False, "one"): Costs(
        (628, 60, 6.32, 0, 412, 0),
        (17.3, 54.5, 0, 47.3e6),
        (0, 1280, 0, 0, 7610),
    ),
}
# No GPU has been measured. From an H100's data sheet: 3.35 TB/s for each pass over 4-byte numbers, and a tensor core's
# product where a product is large; samples as groups are taken to be five times slower. `benchmark` needs none of it.
CUDA_COSTS = {
    (True, True, "several"): Costs((7, 0, 0.015, 0, 0, 0), (0.015, 7, 7, 0)),
    (True, False, "several"): Costs((2.4, 0, 0.005, 0, 0, 0), (0.005, 2.4, 2.4, 0)),
    (False, True, "several"): Costs((7, 0, 0.075, 0, 0, 0), (0.015, 7, 7, 0)),
    (False, False, "several"): Costs((2.4, 0, 0.025, 0, 0, 0), (0.005, 2.4, 2.4, 0)),
}


def choose(case: Case) -> str:
    """Name the method with the least cost, from shapes, type, kind of device, whether the CPU is Intel's, and whether
    the process keeps freed memory and has our C++, alone: all DDP ranks on equal machines take the same.
    """
    if in_strict_export():  # a comparison would close what is left open of the batch
        return "matmul" if case.is_product() else "grouped"
    if case.input[0] == 0:
        return "mixture"  # a convolution cannot have 0 groups
    within, first = methods_within(case), mixed_first(case)
    if first not in within:  # what others run without us has no chunks of ours
        first = next(iter(within), first) if in_export() else "chunked"
    kind, costs = kind_of(case), costs_of(case)
    if not is_open(case) or kind not in costs:
        return first
    if case.channels_last and case.input[0] > 1 and not case.is_product() and "cpp" in within:
        first = "cpp"  # of maps as they are, where a convolution with the samples as groups copies them
    return costs[kind].best(case, first, within)


def is_open(case: Case) -> bool:
    """Tell whether costs decide: not of depthwise kernels, which are mixed with K times fewer multiply-adds, nor, on
    CPUs but Intel's, of one image's single position with fewer input than output channels, where K kernels would give
    many sums of few numbers.
    """
    single = case.input[0] == 1 and case.positions() == 1 and not case.intel
    return not case.is_depthwise() and not (single and case.weight[1] > case.weight[2])


def costs_of(case: Case) -> dict[Kind, Costs]:
    """Give the costs of all kinds where a case is computed."""
    if case.device != "cpu":
        return CUDA_COSTS
    return INTEL_COSTS if case.intel else OTHER_COSTS


def kind_of(case: Case) -> Kind:
    """Say which costs a case has."""
    return case.is_product(), case.training, "one" if case.input[0] == 1 else "several"


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
    if case.keeps_memory or case.is_ours() or in_export():
        return False  # chunks save fetching memory from the system, and mix a second time; others have no chunks
    mixed = case.bytes_of(case.mixed_weights())
    # A product reads and writes the maps where they belong.
    maps = [0, 0] if case.is_product() else [case.bytes_of(n) for n in (math.prod(case.input), case.outputs())]
    if case.training:
        return mixed >= MIXED_BYTES_BY_K * case.weight[0] or sum(maps) >= MAPS_BYTES
    return max(mixed, *maps) >= FETCHED_BYTES


def multiplies_one(case: Case) -> bool:
    """Tell whether one image's depthwise convolution takes longer to begin than a product with the unfolded image."""
    if case.device == "cpu" and not in_export() and (case.channels_last or case.is_ours()):
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
    return found if in_export() else [*found, "chunked"]


def _serves(name: str, case: Case) -> bool:
    if name == "cpp":
        return not in_export() and case.is_mixed_in_cpp()
    return name != "triton" or (case.device == "cuda" and has_triton() and not in_export())
