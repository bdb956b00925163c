"""Methods with a backward pass of their own, as operations that a compiler does not look into."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils.flop_counter import register_flop_formula

from dyn_lightning.per_sample.methods import Geometry, Method, empty_output, positions

Numbers = list[int]


def operation(name: str, forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], plain: Method) -> Any:
    """Register a method that computes its gradients itself.

    Args:
        name: of the operation, in ``torch.ops.dyn_lightning``.
        forward: ``(input, routing, weight, geometry, *settings)`` to the output; the settings are whole numbers.
        backward: ``(grad, input, routing, weight, geometry, *settings, needed)`` to the gradients that are needed.
        plain: a method of torch's own operations, for second derivatives and transforms.

    Returns:
        A function of ``(input, routing, weight, geometry, *settings)``.
    """

    @torch.library.custom_op(f"dyn_lightning::{name}", mutates_args=())
    def run(input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
        return forward(input, routing, weight, *_unpacked(numbers))

    @torch.library.custom_op(f"dyn_lightning::{name}_backward", mutates_args=())
    def run_backward(
        grad: Tensor, input: Tensor, routing: Tensor, weight: Tensor, numbers: Numbers, needed: list[bool]
    ) -> list[Tensor]:
        geometry, *settings = _unpacked(numbers)
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
            with torch.enable_grad():
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
        if not torch.compiler.is_compiling() and is_transformed():
            return plain(input, routing, weight, geometry)
        stride, padding, dilation, groups = geometry
        return run(input, routing, weight, [*stride, *padding, *dilation, groups, *settings])

    return call


def is_transformed() -> bool:
    """Tell whether something runs that operations of one's own have no rule for, or would get wrong: forward-mode
    derivatives (a silent zero), ``torch.func``, ``torch.jit.trace``.
    """
    transforms = torch._C._are_functorch_transforms_active()
    return transforms or torch.autograd.forward_ad._current_level >= 0 or torch.jit.is_tracing()


def _laid_out_as(of: Tensor, gradient: Tensor) -> Tensor:
    """Lay out a gradient as the compiler was told: as ``torch.empty_like`` lays out what it is the gradient of."""
    expected = torch.empty_like(of)
    return gradient if gradient.stride() == expected.stride() else expected.copy_(gradient)


def _flops(input: Any, routing: Any, weight: Any, numbers: Numbers, *_: Any, **__: Any) -> int:
    mixing, products = _multiply_adds(input, weight, _unpacked(numbers)[0])
    return 2 * (mixing + products)


def _backward_flops(grad: Any, input: Any, routing: Any, weight: Any, numbers: Numbers, *_: Any, **__: Any) -> int:
    mixing, products = _multiply_adds(input, weight, _unpacked(numbers)[0])
    return 2 * (3 * mixing + 2 * products)  # mixed again; the routing weights' and the kernels' gradients


def _multiply_adds(input: torch.Size, weight: torch.Size, geometry: Geometry) -> tuple[int, int]:
    rows, columns = positions(input, weight, geometry)
    mixed = input[0] * math.prod(weight[1:])
    return mixed * weight[0], mixed * rows * columns


def _unpacked(numbers: Numbers) -> tuple[Any, ...]:
    a, b, c, d, e, f, groups, *settings = numbers
    return Geometry((a, b), (c, d), (e, f), groups), *settings
