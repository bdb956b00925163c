"""A gradient that autograd adds others to in place."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from dyn_lightning.per_sample.tracing import is_transformed

# Numbers of a map from which on this saves more than it takes.
LARGE_MAP = 1 << 18


def added_in_place(input: Tensor) -> Tensor:
    """Give a map whose gradient has memory of its own, so that autograd adds the gradients of its other uses in place.

    A routed layer's input is used twice: the router's gradient, and that of a shortcut, are added to the convolution's.
    The latter is a view of what a library gave, and autograd does not change the memory of what a view is of: it would
    take a third map for the sum.
    """
    differentiated = input.requires_grad and torch.is_grad_enabled() and not is_transformed()
    return _OfItsOwn.apply(input) if differentiated and input.numel() >= LARGE_MAP else input


class _OfItsOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Second derivatives need the graph; of several gradients at once torch cannot detach.
        return grad if torch.is_grad_enabled() or is_legacy_batchedtensor(grad) else grad.detach()
