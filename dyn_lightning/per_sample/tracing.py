"""What has to be done otherwise while a compiler, a tracer or a function transform looks on."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """Let a function give again what it gave before; compilers and tracers always call it, open sizes have no hash."""
    cached = functools.lru_cache(maxsize=4096, typed=True)(function)  # 1.0 and True equal 1

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*arguments)
        try:
            return cached(*arguments)
        except TypeError:
            return function(*arguments)

    return cast(Function, call)


def is_transformed() -> bool:
    """Tell whether something runs that operations of one's own have no rule for, or would get wrong: forward-mode
    derivatives (a silent zero), ``torch.func``, ``torch.jit.trace``.
    """
    return in_function_transform() or torch.autograd.forward_ad._current_level >= 0 or torch.jit.is_tracing()


def in_function_transform() -> bool:
    """Tell whether ``torch.func`` or ``torch.vmap`` runs, under which tensors do not say how they lie in memory."""
    return torch._C._are_functorch_transforms_active()


def in_strict_export() -> bool:
    """Tell whether ``torch.export.export(..., strict=True)`` runs, which knows no example of an open size."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.7 has it
    return torch.compiler.is_dynamo_compiling() and exporting()


def in_traced_export() -> bool:
    """Tell whether ``torch.export.export(..., strict=False)`` runs, or another tracer that sees an example."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
