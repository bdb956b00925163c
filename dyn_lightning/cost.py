"""What a network costs: parameters, multiply-adds, peak memory."""

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Count the parameters, shared ones once.

    Example:
        >>> parameters(nn.Conv2d(4, 6, 3))
        222
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _added_products(*args: Any, out_shape: Sequence[int], **options: Any) -> int:
    return 2 * math.prod(out_shape)  # operations: a multiplication and an addition


# Involution adds up its products by these.
ADDED_PRODUCTS = {torch.ops.aten.addcmul: _added_products, torch.ops.aten.addcmul_: _added_products}


@torch.no_grad()
def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of one image, in eval mode.

    Counted are convolutions, matrix products and involutions (one fused multiply-add counts one), not biases, norms,
    activations and pooling. A dynamic convolution counts what its paper counts: mixing the kernels, then one
    convolution.

    Args:
        model: any module; its mode is put back afterwards.
        input_shape: one image's ``(C, H, W)``.

    Example:
        >>> multiply_adds(nn.Conv2d(4, 6, 3), (4, 7, 6))
        4320
    """
    with evaluating(model), FlopCounterMode(display=False, custom_mapping=ADDED_PRODUCTS) as counter:
        model(empty_images(model, 1, input_shape))
    return counter.get_total_flops() // 2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def empty_images(model: nn.Module, batch: int, shape: Sequence[int]) -> Tensor:
    """Give zeros ``(batch, C, H, W)`` where the model's parameters are, and of their type."""
    parameter = next(model.parameters(), torch.empty(0))
    return torch.zeros(batch, *shape, device=parameter.device, dtype=parameter.dtype)


def peak_memory(device: torch.device | None = None) -> dict[str, int]:
    """Give this process's peak memory so far, in bytes: ``host``, and ``device`` for a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device is not None and device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
