"""Methods with a backward pass of their own, as operations that a compiler does not look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils.flop_counter import register_flop_formula

from dyn_lightning.per_sample.geometry import Geometry
from dyn_lightning.per_sample.tracing import is_transformed, is_watched, without_autocast

Numbers = list[int]
LIBRARY = torch.library.Library("dyn_lightning", "FRAGMENT")


def operation(
    name: str,
    tensors: tuple[str, ...],
    forward: Callable[..., Tensor],
    backward: Callable[..., list[Tensor]],
    plain: Callable[..., Tensor],
    empty: Callable[..., Tensor],
    multiply_adds: Callable[..., tuple[int, int]],
) -> Any:
    """Register a convolution that computes its gradients itself.

    Args:
        name: of the operation, in ``torch.ops.dyn_lightning``.
        tensors: names of what it takes, the input first.
        forward: ``(*tensors, geometry, *settings)`` to the output; the settings are whole numbers.
        backward: ``(grad, *tensors, geometry, *settings, needed)`` to the gradients that are needed.
        plain: ``(*tensors, geometry)`` to the same output, by operations that have these themselves, for second
            derivatives, transforms and complex numbers.
        empty: ``(*tensors, geometry)`` to memory for the output.
        multiply_adds: ``(*shapes, geometry)`` to those of mixing kernels and those of the convolution.

    Returns:
        A function of ``(*tensors, geometry, *settings)``.
    """
    count = len(tensors)
    takes = f"{', '.join(f'Tensor {tensor}' for tensor in tensors)}, SymInt[] numbers"

    # What an operation takes was cast before, and autocast may be on backward alone.
    def compute(*arguments: Any) -> Tensor:
        with without_autocast(arguments[0]):
            return forward(*arguments[:-1], *_unpacked(arguments[-1]))

    def compute_backward(*arguments: Any) -> list[Tensor]:
        *given, numbers, needed = arguments
        with without_autocast(given[0]):
            gradients = backward(*given, *_unpacked(numbers), needed)
        wanted = [tensor for tensor, need in zip(given[1:], needed, strict=True) if need]
        return [_laid_out_as(of, gradient) for of, gradient in zip(wanted, gradients, strict=True)]

    schema = f"(Tensor grad, {takes}, bool[] needed) -> Tensor[]"
    run = _defined(name, f"({takes}) -> Tensor", compute)
    run_backward = _defined(f"{name}_backward", schema, compute_backward)

    def fake(*arguments: Any) -> Tensor:
        return empty(*arguments[:-1], _unpacked(arguments[-1])[0])

    def fake_backward(*arguments: Any) -> list[Tensor]:
        _, *given, _, needed = arguments
        return [torch.empty_like(of) for of, need in zip(given, needed, strict=True) if need]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.numbers = inputs[-1]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = list(ctx.needs_input_grad[:count]), torch.is_grad_enabled()
        batched = not torch.compiler.is_compiling() and (is_transformed() or is_legacy_batchedtensor(grad))
        if again or batched:  # second derivatives, or gradients of several cotangents at once
            with torch.enable_grad(), without_autocast(grad):
                # Views, since what is saved may depend on each other: routing on the input.
                views = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
                wanted = [tensor for tensor, need in zip(views, needed, strict=True) if need]
                output = plain(*views, _unpacked(ctx.numbers)[0])
                found = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
        else:
            given = grad, *ctx.saved_tensors
            seen = torch.compiler.is_compiling() or is_watched(*given)
            found = iter((run_backward if seen else compute_backward)(*given, ctx.numbers, needed))
        return (*(next(found) if need else None for need in needed), None)

    _count_flops(name, count, multiply_adds)
    torch.library.register_fake(f"dyn_lightning::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"dyn_lightning::{name}_backward", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"dyn_lightning::{name}", gradients, setup_context=save, lib=LIBRARY)

    def save_and_compute(ctx: Any, *inputs: Any) -> Tensor:
        save(ctx, inputs, None)
        return compute(*inputs)

    methods = {"forward": staticmethod(save_and_compute), "backward": staticmethod(gradients)}
    unseen: Any = type(f"dyn_lightning_{name}", (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Tensor:
        given, (geometry, *settings) = arguments[:count], arguments[count:]
        if is_transformed() or given[0].is_complex():
            return plain(*given, geometry)
        stride, padding, dilation, groups = geometry
        numbers = [*stride, *padding, *dilation, groups, *settings]
        if torch.compiler.is_compiling() or is_watched(*given):
            return run(*given, numbers)
        return unseen.apply(*given, numbers)  # a small layer's time is that of calling an operation

    return call


def _defined(name: str, schema: str, compute: Callable[..., Any]) -> Any:
    """Define an operation as ``torch.library.custom_op`` does, but for what a small layer would wait for: it does not
    check that what is given is new (tests do), and cannot be defined again.
    """
    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    return getattr(torch.ops.dyn_lightning, name).default


def _count_flops(name: str, count: int, multiply_adds: Callable[..., tuple[int, int]]) -> None:
    """Let torch's counter know the operations of an operation of so many tensors."""

    def flops(*arguments: Any, **_: Any) -> int:
        return 2 * sum(multiply_adds(*arguments[:count], _unpacked(arguments[count])[0]))

    def backward_flops(*arguments: Any, **_: Any) -> int:
        _, *shapes = arguments[: 1 + count]
        numbers, (of_input, *of_kernels) = arguments[1 + count : 3 + count]
        mixing, products = multiply_adds(*shapes, _unpacked(numbers)[0])
        # Mixed again, and what they are mixed of; the input's gradient, and the mixed kernels'.
        return 2 * ((1 + sum(of_kernels)) * mixing + (of_input + any(of_kernels)) * products)

    register_flop_formula(getattr(torch.ops.dyn_lightning, name))(flops)
    register_flop_formula(getattr(torch.ops.dyn_lightning, f"{name}_backward"))(backward_flops)


def _laid_out_as(of: Tensor, gradient: Tensor) -> Tensor:
    """Lay out a gradient as the compiler was told: as ``torch.empty_like`` lays out what it is the gradient of."""
    expected = torch.empty_like(of, device="meta").stride()
    return gradient if gradient.stride() == expected else torch.empty_like(of).copy_(gradient)


def _unpacked(numbers: Numbers) -> tuple[Any, ...]:
    a, b, c, d, e, f, groups, *settings = numbers
    return Geometry((a, b), (c, d), (e, f), groups), *settings
