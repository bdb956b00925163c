"""Single layers, forward and backward, as they are, in channels_last, in bfloat16 and compiled.

In bfloat16 under autocast, of maps in bfloat16, as a network's layers have them, but for the first. The layer as it is
is measured twice, as "plain" and, with numbers of its own, as "again": what they differ by is chance. A ratio is the
median of those to plain's time in the same round, since a machine's speed changes from minute to minute.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dyn_lightning.layers import DynamicConv2d
from experiments.benchmarks.dynamic_conv.layers import Shape
from experiments.benchmarks.timing import in_turn, medians, milliseconds

SHAPES: list[Shape] = [
    (128, 128, 3, 1, 1, 1, 28),
    (256, 256, 3, 1, 1, 1, 14),
    (256, 256, 3, 1, 1, 1, 2),
    (24, 144, 1, 1, 0, 1, 56),
    (960, 160, 1, 1, 0, 1, 7),
    (144, 144, 3, 1, 1, 144, 56),
]


def modes(options: Any) -> list[dict[str, Any]]:
    """Measure the training step of single layers as they are, in channels_last, in bfloat16 and compiled."""
    results = []
    names = ("plain", "again", "channels_last", "bfloat16", "compiled")
    print("\nmilliseconds of a forward and backward pass of DynamicConv2d, then relative to it, and nn.Conv2d likewise")
    heads = "".join(f"{name:>14}" for name in names[1:])
    print(f"{'in, out, kernel, stride, padding, groups, map':48}{'':>8}{'plain':>9}{heads}")
    for shape in SHAPES:
        in_channels, out_channels, *geometry, groups, pixels = shape
        arguments = (in_channels, out_channels, *geometry, 1, groups, False)
        torch._dynamo.reset()  # sizes that were seen to change would be compiled as open ones
        dynamic = DynamicConv2d(*arguments, num_kernels=options.kernels)
        for kind, layer in (("dynamic", dynamic), ("static", nn.Conv2d(*arguments))):
            x = torch.randn(options.batch, in_channels, pixels, pixels, device=options.device, requires_grad=True)
            half = x.detach().bfloat16().requires_grad_()
            last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            layer = layer.to(options.device)
            passes = {
                "plain": partial(both_passes, layer, x),
                "again": partial(both_passes, copy.deepcopy(layer), x.detach().clone().requires_grad_()),
                "channels_last": partial(both_passes, copy.deepcopy(layer).to(memory_format=torch.channels_last), last),
                "bfloat16": partial(both_passes, layer, half, torch.bfloat16),
                "compiled": partial(both_passes, torch.compile(copy.deepcopy(layer), fullgraph=True), x),
            }
            for function in passes.values():
                function()
            times = in_turn(partial(_milliseconds, passes, options.device), names, options.rounds)
            ratios = {name: round(ratio(times[name], times["plain"]), 3) for name in names[1:]}
            taken = medians(times)
            columns = "".join(f"{ratios[name]:14.2f}" for name in names[1:])
            print(f"{shape!s:48}{kind:>8}{taken['plain']:9.2f}{columns}", flush=True)
            results.append({"shape": shape, "layer": kind, "milliseconds": taken, "ratios": ratios})
    return results


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Give the median ratio of times to others, round by round."""
    return median(time / other for time, other in zip(times, others, strict=True))


def both_passes(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Run a layer forward and backward."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


def _milliseconds(passes: Mapping[str, Callable[[], None]], device: torch.device, name: str) -> list[float]:
    return [milliseconds(passes[name], 1, device)]
