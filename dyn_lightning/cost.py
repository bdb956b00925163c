"""What a network costs: parameters, multiply-adds, peak memory."""

import resource
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Count the parameters, shared ones once.

    Example:
        >>> parameters(nn.Conv2d(4, 6, 3))
        222
    """
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of one image, in eval mode.

    Counted are convolutions and matrix products (one fused multiply-add counts one), not biases, norms, activations and
    pooling. A dynamic convolution counts what its paper counts: mixing the kernels, then one convolution.

    Args:
        model: any module; its mode is put back afterwards.
        input_shape: one image's ``(C, H, W)``.

    Example:
        >>> multiply_adds(nn.Conv2d(4, 6, 3), (4, 7, 6))
        4320
    """
    modes = {module: module.training for module in model.modules()}
    reference = next(model.parameters())
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, *input_shape, device=reference.device, dtype=reference.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.get_total_flops() // 2


def peak_memory() -> dict[str, int]:
    """Give this process's peak memory so far, in bytes: ``host``, and ``device`` where a CUDA device was used."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak
