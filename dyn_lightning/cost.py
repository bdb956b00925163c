"""What a network costs: parameters, multiply-adds, methods, peak memory."""

import itertools
import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning import functional


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
    token = functional.INSTEAD.set("grouped")  # the mixture would count K convolutions
    try:
        with evaluating(model), FlopCounterMode(display=False, custom_mapping=ADDED_PRODUCTS) as counter:
            model(empty_images(model, 1, input_shape))
    finally:
        functional.INSTEAD.reset(token)
    return counter.get_total_flops() // 2


def methods(
    model: nn.Module, input_shape: Sequence[int], batch_size: int = 32, training: bool = True
) -> dict[str, str]:
    """Name the method by which each layer computes its per-sample convolution (``dynamic_conv2d``), without computing.

    The model runs on empty images in eval mode, uncompiled: branches that only training takes are left out.

    Args:
        model: any module; its mode is put back afterwards.
        input_shape: one image's ``(C, H, W)``.
        batch_size: images at once.
        training: whether there is a backward pass too.

    Returns:
        The method by the layer's name; where a layer has several, in the order in which they run.

    Example:
        >>> from dyn_lightning.layers import CondConv2d
        >>> layers = CondConv2d(96, 96, 3, padding=1), CondConv2d(96, 96, 3, padding=1, groups=96)
        >>> methods(nn.Sequential(*layers), (96, 14, 14))
        {'0': 'cpp', '1': 'grouped'}
    """
    running: list[str] = []
    found: dict[str, list[str]] = {}
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: _drop(running), always_call=True))

    def note(method: str) -> None:
        found.setdefault(running[-1], []).append(method)

    token = functional.NOTE.set(note)
    try:
        images = empty_images(model, batch_size, input_shape)
        with (
            torch.compiler.set_stance("force_eager"),
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
            evaluating(model),
            torch.set_grad_enabled(training),
        ):
            model(fake.from_tensor(images))
    finally:
        functional.NOTE.reset(token)
        for hook in hooks:
            hook.remove()
    return {name: ", ".join(names) for name, names in found.items()}


def _drop(running: list[str]) -> None:
    running.pop()  # what a hook returns would take the place of the output


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


def peak_bytes(function: Callable[[], object], device: torch.device | None = None) -> int:
    """Give the bytes that a function takes at once while it runs, beyond what was taken before.

    Args:
        function: that is called, once.
        device: a CUDA device whose memory is counted; otherwise it is the tensors on the CPU, those inside of torch's
            operations too (not what a library such as oneDNN takes for itself).

    Example:
        >>> peak_bytes(lambda: torch.ones(1000) @ torch.ones(1000, 2000))
        8012000
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))
