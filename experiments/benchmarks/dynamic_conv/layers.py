"""Single layers of every shape that the networks' replaced layers have; no router, no optimizer.

A layer's kernels stay in the cache from one call to the next, as far as they fit, which they do not in a network.
``auto``'s time is that of the method which it takes. Whoever shares the machine's memory may slow it down for seconds,
all rounds of a layer, and not all methods alike: in several passes a layer is measured again minutes later.
"""

import math
import statistics
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.convert import convert
from dyn_lightning.cost import peak_bytes
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import CondConv2d
from dyn_lightning.per_sample.mixed import why_not
from dyn_lightning.per_sample.reduction import Plan, plan_of
from experiments.benchmarks.dynamic_conv.networks import NETWORKS, head, names
from experiments.benchmarks.timing import interleaved

# (batch, 0 for that of the options, whether there is a backward pass)
JOBS = {"forward and backward": (0, True), "forward": (0, False), "forward of one": (1, False)}
SIZES = (224, 32)
ROUNDS_OF_ONE = 3  # for each round of a batch: a few microseconds are soon disturbed, and soon measured again
Shape = tuple[int, int, int, int, int, int, int]  # channels in, out, kernel size, stride, padding, groups, map size


@cache
def shapes() -> dict[Shape, list[str]]:
    """List the shapes of the networks' replaced layers, and the networks that have them."""
    found: dict[Shape, list[str]] = {}
    for name, build in NETWORKS.items():
        model = build().eval()
        convert(model, "condconv", num_experts=1)
        for size in SIZES:
            for shape in _shapes(model, size):
                found.setdefault(shape, []).append(f"{name}, {size} px")
    return found


@torch.no_grad()
def _shapes(model: nn.Module, size: int) -> Iterator[Shape]:
    seen: list[Shape] = []

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        kernel, pixels = layer.kernel_size[0], inputs[0].shape[2]
        numbers = (kernel, layer.stride[0], layer.padding[0], layer.groups, pixels)
        seen.append((layer.in_channels, layer.out_channels, *numbers))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, CondConv2d)]
    model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return iter(dict.fromkeys(seen))


def measure_layer(
    shape: Shape, batch: int, training: bool, options: Any
) -> tuple[dict[str, float], dict[str, float], str]:
    """Give the milliseconds and the peak MiB of each method, and the method that auto takes."""
    in_channels, out_channels, size, stride, padding, groups, pixels = shape
    kernels = options.kernels
    x = torch.randn(batch, in_channels, pixels, pixels, device=options.device)
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(training)
    routing = torch.softmax(torch.randn(batch, kernels, device=options.device), 1).requires_grad_(training)
    stacked = (kernels, out_channels, in_channels // groups, size, size)
    weight = torch.randn(stacked, device=options.device).requires_grad_(training)
    static = weight[0].detach().clone().requires_grad_(training)
    geometry = (stride, padding, 1, groups)
    peer = timm.layers.CondConv2d(in_channels, out_channels, size, stride, padding, 1, groups, num_experts=kernels).to(
        options.device
    )
    # In the same memory, so that it finds the kernels in the cache as often.
    peer.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=training)

    def compute(name: str) -> None:
        with torch.autocast(options.device.type, options.dtype, enabled=options.dtype != torch.float32):
            if name == "static":
                y, leaves = F.conv2d(x, static, None, *geometry), [x, static]
            elif name == "timm":
                y, leaves = peer(x, routing), [x, routing, peer.weight]
            else:
                y, leaves = dynamic_conv2d(x, routing, weight, None, *geometry, method=name), [x, routing, weight]
        if training:
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    with torch.set_grad_enabled(training):
        plan = _plan(shape, batch, training, options)
        case = (plan.input, plan.weight, plan.geometry, options.dtype)
        serves = not why_not(*case, options.device.type, options.channels_last)
        functions = {name: partial(compute, name) for name in names(options) if name != "cpp" or serves}
        times = interleaved(functions, _rounds(batch, options), options.device, patience=4, least_ms=5)
        peaks = {name: round(peak_bytes(function, options.device) / 2**20, 3) for name, function in functions.items()}
    return times, peaks, choose_method(x.to(options.dtype), weight.to(options.dtype), *geometry, training=training)


def layers(options: Any) -> list[dict[str, Any]]:
    """Measure every layer shape at every job, and say how good the choices are."""
    results = []
    columns = names(options)[1:]
    for job, (batch, training) in JOBS.items():
        if job not in options.jobs:
            continue
        batch = batch or options.batch
        print(
            f"\n{job}, batch {batch}: milliseconds of the static convolution, times relative to it, and the peak MiB "
            "of the static one, auto and timm's"
        )
        heads = head(["static", *columns, "MiB", "auto's", "timm's"])
        print(f"{'in, out, kernel, stride, padding, groups, map':48}{heads}  auto")
        passes: dict[Shape, list[dict[str, float]]] = {
            shape: [] for shape in shapes() if not options.shapes or shape in options.shapes
        }
        for number in range(1, options.passes + 1):
            if options.passes > 1:
                print(f"pass {number} of {options.passes}, medians of the passes so far")
            found = []
            for shape, taken in passes.items():
                one, peaks, chosen = measure_layer(shape, batch, training, options)
                taken.append(one)
                times = {name: round(statistics.median(each[name] for each in taken), 4) for name in one}
                ratios = "".join(
                    f"{times[name] / times['static']:9.2f}" if name in times else f"{'':9}" for name in columns
                )
                held = "".join(f"{peaks[name]:9.1f}" for name in ("static", chosen, "timm"))
                print(f"{shape!s:48}{times['static']:9.2f}{ratios}{held}  {chosen}", flush=True)
                about = {"job": job, "batch": batch, "training": training, "shape": shape, "networks": shapes()[shape]}
                about["rounds"] = _rounds(batch, options)
                about["kernel"] = _plan(shape, batch, training, options).weight[3:]
                found.append({**about, "auto": chosen, "milliseconds": times, "MiB": peaks})
        print(quality(found))
        results += found
    return results


def _rounds(batch: int, options: Any) -> int:
    return int(options.rounds) * (ROUNDS_OF_ONE if batch == 1 else 1)


def _plan(shape: Shape, batch: int, training: bool, options: Any) -> Plan:
    """Say what is computed: with less of the kernel where the rest sees padding alone, and that pays."""
    in_channels, out_channels, size, stride, padding, groups, pixels = shape
    weight = (options.kernels, out_channels, in_channels // groups, size, size)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    return plan_of((batch, in_channels, pixels, pixels), weight, *geometry, training)


def quality(results: list[dict[str, Any]]) -> str:
    """Say how far the chosen methods are from the best ones and from timm's layer."""
    over = sorted(
        _chosen(result) / min(time for name, time in result["milliseconds"].items() if name not in ("static", "timm"))
        for result in results
    )
    peer = sorted(result["milliseconds"]["timm"] / _chosen(result) for result in results)
    near = sum(ratio <= 1.1 for ratio in over) / len(over)
    slower = sum(ratio < 1 / 1.05 for ratio in peer)
    mean = math.exp(sum(map(math.log, peer)) / len(peer))
    return (
        f"auto: within 10 % of the best method on {near:.1%} of {len(over)} shapes, at most {over[-1]:.2f} times it; "
        f"{mean:.2f} times as fast as timm's CondConv2d (geometric mean; least {peer[0]:.2f}, most {peer[-1]:.1f}; "
        f"on {slower} shapes more than 5 % slower)"
    )


def _chosen(result: dict[str, Any]) -> float:
    return result["milliseconds"][result["auto"]]
