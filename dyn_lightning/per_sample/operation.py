"""Methods with a backward pass of their own, as operations that a compiler does not look into."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils.flop_counter import register_flop_formula

from dyn_lightning.per_sample.geometry import Geometry, positions
from dyn_lightning.per_sample.methods import Method, empty_output
from dyn_lightning.per_sample.tracing import is_transformed

Numbers = list[int]


def operation(name: str, forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], plain: Method) -> Any:
    """Register a method that computes its gradients itself.

    Args:
        name: of the operation, in ``torch.ops.dyn_lightning``.
        forward: ``(input, routing, weight, geometry, *settings)`` to the output; the settings are whole numbers.
        backward: ``(grad, input, routing, weight, geometry, *settings, needed)`` to the gradients that are needed.
        plain: a method of torch's own operations, for second derivatives, transforms and complex numbers.

    Returns:
        A function of ``(input, routing, weight, geometry, *settings)``.
    """
    takes = "Tensor input, Tensor routing, Tensor weight, SymInt[] numbers"  # torch 2.6 cannot infer it from list[int]

    @torch.library.custom_op(f"dyn_lightning::{name}", mutates_args=(), schema=f"({takes}) -> Tensor")
    def run(input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
        with _as_it_is(input):
            return forward(input, routing, weight, *_unpacked(numbers))

    @torch.library.custom_op(
        f"dyn_lightning::{name}_backward", mutates_args=(), schema=f"(Tensor grad, {takes}, bool[] needed) -> Tensor[]"
    )
    def run_backward(
        grad: Tensor, input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers, needed: list[bool]
    ) -> list[Tensor]:
        geometry, *settings = _unpacked(numbers)
        with _as_it_is(input):
            gradients = backward(grad, input, routing, weight, geometry, *settings, needed)
        wanted = [tensor for tensor, need in zip((input, routing, weight), needed, strict=True) if need]
        return [_laid_out_as(of, gradient) for of, gradient in zip(wanted, gradients, strict=True)]

    def fake(input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
        return empty_output(input, weight, _unpacked(numbers)[0])

    def fake_backward(
        grad: Tensor, input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers, needed: list[bool]
    ) -> list[Tensor]:
        return [torch.empty_like(of) for of, need in zip((input, routing, weight), needed, strict=True) if need]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.numbers = inputs[3]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = list(ctx.needs_input_grad[:3]), torch.is_grad_enabled()
        batched = not torch.compiler.is_compiling() and (is_transformed() or is_legacy_batchedtensor(grad))
        if again or batched:  # second derivatives, or gradients of several cotangents at once
            with torch.enable_grad(), _as_it_is(grad):
                # Views, since what is saved may depend on each other: routing on the input.
                tensors = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
                wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
                output = plain(*tensors, _unpacked(ctx.numbers)[0])
                found = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
        else:
            found = iter(run_backward(grad, *ctx.saved_tensors, ctx.numbers, needed))
        return (*(next(found) if need else None for need in needed), None)

    register_flop_formula(getattr(torch.ops.dyn_lightning, name))(_flops)
    register_flop_formula(getattr(torch.ops.dyn_lightning, f"{name}_backward"))(_backward_flops)
    run.register_fake(fake)
    run_backward.register_fake(fake_backward)
    run.register_autograd(gradients, setup_context=save)

    def call(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, *settings: int) -> Tensor:
        if is_transformed() or input.is_complex():
            return plain(input, routing, weight, geometry)
        stride, padding, dilation, groups = geometry
        return run(input, routing, weight, [*stride, *padding, *dilation, groups, *settings])

    return call


def _as_it_is(tensor: Tensor) -> AbstractContextManager[Any]:
    """Let autocast cast nothing: what an operation takes was cast before, and autocast may be on backward alone."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _laid_out_as(of: Tensor, gradient: Tensor) -> Tensor:
    """Lay out a gradient as the compiler was told: as ``torch.empty_like`` lays out what it is the gradient of."""
    expected = torch.empty_like(of, device="meta").stride()
    return gradient if gradient.stride() == expected else torch.empty_like(of).copy_(gradient)


def _flops(input: Any, routing: Any, weight: Any, numbers: Numbers, *_: Any, **__: Any) -> int:
    mixing, products = _multiply_adds(input, weight, _unpacked(numbers)[0])
    return 2 * (mixing + products)


def _backward_flops(
    grad: Any, input: Any, routing: Any, weight: Any, numbers: Numbers, needed: list[bool], *_: Any, **__: Any
) -> int:
    mixing, products = _multiply_adds(input, weight, _unpacked(numbers)[0])
    # Mixed again, the routing weights' and the kernels' gradients; the input's and the mixed kernels' gradients.
    return 2 * ((1 + needed[1] + needed[2]) * mixing + (needed[0] + (needed[1] or needed[2])) * products)


def _multiply_adds(input: torch.Size, weight: torch.Size, geometry: Geometry) -> tuple[int, int]:
    rows, columns = positions(input, weight, geometry)
    mixed = input[0] * math.prod(weight[1:])
    return mixed * weight[0], mixed * rows * columns


def _unpacked(numbers: Numbers) -> tuple[Any, ...]:
    a, b, c, d, e, f, groups, *settings = numbers
    return Geometry((a, b), (c, d), (e, f), groups), *settings
