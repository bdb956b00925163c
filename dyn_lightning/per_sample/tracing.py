"""What has to be done otherwise while a compiler, a tracer or a function transform looks on."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.torch_version import TorchVersion

Function = TypeVar("Function", bound=Callable[..., Any])
# Whether a compiler can compare what is in a constant's tuples: those of torch 2.8 to 2.10 cannot, that of 2.14 can;
# those between were not tried.
KEEPS_CONSTANTS = torch.__version__ >= TorchVersion("2.14")
MOST_REMEMBERED = 4096  # sets of arguments; what comes after them begins anew


def remembered(function: Function) -> Function:
    """Let a function, that never gives None, give again what it gave before for equal arguments.

    A plain dict, since ``functools.lru_cache`` keeps an order too: around a convolution, which empties the processor's
    caches, what a call touches costs more than what it computes.
    """
    known: dict[tuple[Any, ...], Any] = {}

    def call(*arguments: Any) -> Any:
        try:
            found = known.get(arguments)
        except TypeError:  # lists have no hash
            return function(*arguments)
        if found is None:
            found = function(*arguments)
            if not torch.jit.is_tracing():  # to which sizes are tensors
                if len(known) >= MOST_REMEMBERED:
                    known.clear()
                known[arguments] = found
        return found

    return cast(Function, functools.update_wrapper(call, function))


def is_transformed() -> bool:
    """Tell whether something runs that operations of one's own have no rule for, or would get wrong: forward-mode
    derivatives (a silent zero), ``torch.func``, ``torch.jit.trace``.
    """
    return in_function_transform() or torch.autograd.forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_watched(*tensors: Tensor) -> bool:
    """Tell whether something has to see each operation of these tensors, and would miss what is called beside torch: a
    mode (fake tensors, counters of operations), a profiler, a function transform, or a tensor that is not its memory
    alone: of a subclass but ``Parameter``, or to be negated, mapped or made a function of by torch.
    """
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes > 0 or torch.autograd._profiler_enabled() or is_transformed():
        return True
    return any(type(tensor) not in TYPES or _dispatched_by(tensor) not in PLAIN for tensor in tensors)


def _dispatched_by(tensor: Tensor) -> int:
    return int(torch._C._dispatch_keys(tensor).raw_repr())


def _plain() -> set[int]:
    """Give what tensors are dispatched by that are their memory on a CPU alone."""
    with torch.inference_mode():
        of_inference = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        return {_dispatched_by(torch.empty(0, device="cpu")), _dispatched_by(of_inference)}


PLAIN, TYPES = _plain(), (Tensor, torch.nn.Parameter)


def autocasts(device: str) -> bool:
    """Tell whether autocast is on for a type of device; to ask for the device meta would be an error."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Let autocast cast nothing on a tensor's device, if it is on."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def in_function_transform() -> bool:
    """Tell whether ``torch.func`` or ``torch.vmap`` runs, under which tensors do not say how they lie in memory."""
    return torch._C._are_functorch_transforms_active()


def are_constant(*values: Any) -> bool:
    """Tell whether a compiler can take what is computed of values for a constant: where it leaves no number open."""
    if not KEEPS_CONSTANTS:
        return False
    for value in values:
        if isinstance(value, (tuple, list)):
            if not are_constant(*value):
                return False
        elif isinstance(value, int) and not has_static_value(value):
            return False
    return True


def is_one(batch: int) -> bool:
    """Tell whether a batch is of one image. While a network is exported it is said to be of several, since to compare
    would close what is left open of the batch; a tracer's sizes are tensors.
    """
    return not in_export() and type(batch) is int and batch == 1


def in_strict_export() -> bool:
    """Tell whether ``torch.export.export(..., strict=True)`` runs, which knows no example of an open size."""
    # What `torch.compiler.is_exporting` reads, which to the compiler of torch 2.10 and before is always True.
    return torch.compiler.is_dynamo_compiling() and torch.compiler._is_exporting_flag


def in_traced_export() -> bool:
    """Tell whether ``torch.export.export(..., strict=False)`` runs, or another tracer that sees an example."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def how_exported() -> str:
    """Say how a network is exported, with sizes that may be left open: "strict", "traced", or "" if it is not."""
    return "strict" if in_strict_export() else "traced" if in_traced_export() else ""


def in_export() -> bool:
    """Tell whether a network is exported in either way."""
    return how_exported() != ""
