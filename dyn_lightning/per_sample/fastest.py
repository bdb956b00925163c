"""The fastest method, by timing them: what the model of their costs in `choice` does not know of."""

import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dyn_lightning.per_sample.by_name import run
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.choice import choose, methods_within
from dyn_lightning.per_sample.tracing import is_transformed

# What `fastest` found, by all that a time depends on.
MEASURED: dict[tuple[Any, ...], str] = {}


def fastest(input: Tensor, routing: Tensor, weight: Tensor, case: Case) -> str:
    """Time the methods that keep within ``max_mixed_bytes``, once a case, and remember the fastest.

    DDP ranks may find different ones, of equal value. Inputs of many sizes are many cases.
    """
    if isinstance(input, FakeTensor) or input.device.type == "meta" or is_transformed():
        return choose(case)  # there is nothing to time
    differentiated = [case.training and tensor.requires_grad for tensor in (input, routing, weight)]
    key = (case, input.device, *differentiated, torch.get_num_threads())
    if key not in MEASURED:
        # Nothing around may see these runs: activation checkpoints, offloading, counters of operations.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
        with torch.inference_mode(False), torch.set_grad_enabled(case.training), hooks, _disable_current_modes():
            # Not copied, if that can be: how the input lies in memory is a part of what is timed.
            tensors = [
                (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_(needed)
                for tensor, needed in zip((input, routing, weight), differentiated, strict=True)
            ]
            times = {}
            for method in methods_within(case):
                try:
                    times[method] = _milliseconds(method, tensors, case)
                except torch.OutOfMemoryError:  # of a GPU; chunks can be small enough
                    if method == "chunked":
                        raise
                except Exception as error:
                    if method != "triton":
                        raise
                    warnings.warn(f"method='triton' does not run here, so another is taken: {error}", stacklevel=2)
        MEASURED[key] = min(times, key=lambda name: times[name])
    return MEASURED[key]


def _milliseconds(method: str, tensors: list[Tensor], case: Case) -> float:
    input, routing, weight = tensors
    times = []
    for _ in range(4):
        start = time.perf_counter()
        output = run(method, input, routing, weight, case)
        if case.training:
            leaves = [tensor for tensor in tensors if tensor.requires_grad]
            torch.autograd.grad(output, leaves, torch.ones_like(output))
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
