"""The methods of the per-sample convolution by name, those of torch's own operations and those of ours."""

import importlib.util
import os

import torch
from torch import Tensor

from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.chunked import CACHED_BYTES, CACHED_BYTES_OF_ONE, chunked, chunked_rows
from dyn_lightning.per_sample.geometry import Geometry
from dyn_lightning.per_sample.methods import Method, grouped, matmul, mixture
from dyn_lightning.per_sample.mixed import cpp


def triton(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Mix tiles of the kernels where they are used, in kernels of Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests, on any device
    if not (has_triton() and (input.is_cuda or interpreted)):
        unfit = ["triton"] if input.is_cpu else ["triton", "cpp"]
        others = [name for name in METHODS if name not in unfit]
        raise ValueError(
            f"method='triton' needs a CUDA device and the package triton, not {input.device}: take {others}"
        )
    from dyn_lightning.per_sample.triton_kernels import convolve

    return convolve(input, routing, weight, geometry)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Tell whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


METHODS: dict[str, Method] = {
    "grouped": grouped,
    "matmul": matmul,
    "mixture": mixture,
    "chunked": chunked,
    "cpp": cpp,
    "triton": triton,
}

CHOICES = ("auto", "benchmark", *METHODS)


def run(method: str, input: Tensor, routing: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Compute by a method; chunks get the bytes that they may take."""
    if method != "chunked":
        return METHODS[method](input, routing, weight, case.geometry)
    rows = case.has_room_for_rows()
    room = case.allowed() - (case.bytes_of_rows() if rows else 0)
    cached = CACHED_BYTES if case.input[0] > 1 else CACHED_BYTES_OF_ONE
    limit = min(cached, room) if case.device == "cpu" else room
    return (chunked_rows if rows else chunked)(input, routing, weight, case.geometry, limit)
