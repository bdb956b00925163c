"""A gradient that autograd adds others to in place."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from dyn_lightning.per_sample.tracing import is_transformed

# Maps of so many numbers gain more by it than it takes.
LARGE_MAP = 1 << 19


def added_in_place(input: Tensor, routing: Tensor) -> Tensor:
    """Give a map whose gradient has memory of its own, so that autograd adds the router's gradient to it in place.

    A routed layer's input is used twice, unless its routing weights were computed from something else, or fixed. The
    convolution's gradient comes first and, from samples as groups and from products with the map as it is, as a view:
    autograd does not change what a view is of, and would take a third map for the sum.
    """
    twice = routing.grad_fn is not None and input.requires_grad and input.numel() >= LARGE_MAP
    return _OfItsOwn.apply(input) if twice and torch.is_grad_enabled() and not is_transformed() else input


class _OfItsOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.detach()  # a view's errors, if the map is changed afterwards, would speak of this function

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # adds as it likes
            return grad
        # Second derivatives need the graph; of several gradients at once torch cannot detach.
        return grad if torch.is_grad_enabled() or is_legacy_batchedtensor(grad) else grad.detach()
