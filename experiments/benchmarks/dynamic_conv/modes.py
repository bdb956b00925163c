"""Single layers, forward and backward, and training steps of whole networks, as they are, in channels_last, in
bfloat16 and compiled.

In bfloat16 under autocast; single layers of maps in bfloat16, as a network's layers have them, but for the first. Each
is measured twice as it is, as "plain" and, in other memory, as "again": what these differ by is chance. A layer's ratio
is the median of those to plain's time in the same round, since a machine's speed changes from minute to minute, of
several layers of a shape, since where their numbers lie in memory changes a time by up to a fifth; a network's is that
of the medians of all steps, in a process for each mode (see ``networks``).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dyn_lightning.layers import DynamicConv2d
from experiments.benchmarks.dynamic_conv.layers import Shape
from experiments.benchmarks.dynamic_conv.networks import Stepping, spread
from experiments.benchmarks.timing import in_turn, medians, milliseconds

SHAPES: list[Shape] = [
    (128, 128, 3, 1, 1, 1, 28),
    (256, 256, 3, 1, 1, 1, 14),
    (256, 256, 3, 1, 1, 1, 2),
    (24, 144, 1, 1, 0, 1, 56),
    (960, 160, 1, 1, 0, 1, 7),
    (144, 144, 3, 1, 1, 144, 56),
]
WHOLE = [("MobileNetV2 x0.5", 224), ("MobileNetV2", 32), ("ResNet-18", 32)]  # networks, and pixels of their images
MODES = ("plain", "again", "channels_last", "bfloat16", "compiled")
ROUNDS_OF_LAYERS = 6  # of each of as many layers of a shape as there are rounds of networks


def modes(options: Any) -> list[dict[str, Any]]:
    """Measure single layers and whole networks as they are, in channels_last, in bfloat16 and compiled."""
    print("\nmilliseconds of a forward and backward pass of DynamicConv2d, then relative to it, and nn.Conv2d likewise")
    print(_row("in, out, kernel, stride, padding, groups, map", "", "plain", MODES[1:]))
    layers = _layers(options)
    print("\nmilliseconds of a training step of a network of them, then relative to it, and with nn.Conv2d likewise")
    print(_row("network", "", "plain", MODES[1:]))
    return layers + [row for network, size in WHOLE for row in _network(network, size, options)]


def _row(name: str, kind: str, plain: str, others: Sequence[str]) -> str:
    return f"{name:48}{kind:>8}{plain:>9}" + "".join(f"{other:>14}" for other in others)


def _layers(options: Any) -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES:
        for kind in ("dynamic", "static"):
            times: dict[str, list[float]] = {mode: [] for mode in MODES}
            kept = []  # else the next ones would lie where these did
            for _ in range(options.rounds):
                kept.append(_passes(shape, kind, options))
                found = in_turn(partial(_milliseconds, kept[-1], options.device), MODES, ROUNDS_OF_LAYERS)
                times = {mode: times[mode] + found[mode] for mode in MODES}
            ratios = {mode: round(ratio(times[mode], times["plain"]), 3) for mode in MODES[1:]}
            taken = medians(times)
            _print(str(shape), kind, taken["plain"], ratios)
            results.append({"shape": shape, "layer": kind, "milliseconds": taken, "ratios": ratios})
    return results


def _passes(shape: Shape, kind: str, options: Any) -> dict[str, Callable[[], None]]:
    in_channels, out_channels, *geometry, groups, pixels = shape
    arguments = (in_channels, out_channels, *geometry, 1, groups, False)
    built = nn.Conv2d(*arguments) if kind == "static" else DynamicConv2d(*arguments, num_kernels=options.kernels)
    layer = built.to(options.device)
    x = torch.randn(options.batch, in_channels, pixels, pixels, device=options.device, requires_grad=True)
    half = x.detach().bfloat16().requires_grad_()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch._dynamo.reset()  # sizes that were seen to change would be compiled as open ones
    passes = {
        "plain": Passes(layer, x),
        "again": Passes(copy.deepcopy(layer), x.detach().clone().requires_grad_()),
        "channels_last": Passes(copy.deepcopy(layer).to(memory_format=torch.channels_last), last),
        "bfloat16": Passes(layer, half, torch.bfloat16),
        "compiled": Passes(torch.compile(copy.deepcopy(layer), fullgraph=True), x),
    }
    for function in passes.values():
        function()
    return passes


def _network(network: str, size: int, options: Any) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        stepping = {}
        for kind, method in (("dynamic", "auto"), ("static", "static")):
            for mode in MODES:
                settings = (network, method, options.kernels, size, options.batch, True, _in_mode(options, mode))
                stepping[f"{kind}, {mode}"] = stack.enter_context(Stepping(*settings))
        steps = in_turn(lambda name: stepping[name].times("auto"), [*stepping], options.rounds)
    results = []
    for kind in ("dynamic", "static"):
        of_kind = {mode: steps[f"{kind}, {mode}"] for mode in MODES}
        taken = medians(of_kind)
        ratios = {mode: round(taken[mode] / taken["plain"], 3) for mode in MODES[1:]}
        _print(f"{network}, {size} px", kind, taken["plain"], ratios)
        about = {"network": network, "size": size, "layers": kind, "batch": options.batch}
        results.append({**about, "milliseconds": taken, "ratios": ratios, "spread": spread(of_kind)})
    return results


def _in_mode(options: Any, mode: str) -> Any:
    options = copy.copy(options)
    options.dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    options.channels_last, options.compiled = mode == "channels_last", mode == "compiled"
    return options


def _print(name: str, kind: str, plain: float, ratios: Mapping[str, float]) -> None:
    print(_row(name, kind, f"{plain:.2f}", [f"{ratio:.2f}" for ratio in ratios.values()]), flush=True)


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Give the median ratio of times to others, round by round."""
    return median(time / other for time, other in zip(times, others, strict=True))


class Passes:
    """Runs a layer forward and backward.

    Args:
        layer: of one input.
        x: the input.
        dtype: of autocast, if it is not float32.
    """

    def __init__(self, layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.layer, self.x, self.dtype = layer, x, dtype
        self.grad = torch.ones_like(self.forward())  # once: the time to write it is not the layer's

    def forward(self) -> Tensor:
        """Run the layer forward."""
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.layer(self.x)

    def __call__(self) -> None:
        """Run both passes."""
        torch.autograd.grad(self.forward(), [self.x, *self.layer.parameters()], self.grad)


def _milliseconds(passes: Mapping[str, Callable[[], None]], device: torch.device, name: str) -> list[float]:
    passes[name]()  # not counted: it brings its code into the caches, where the others leave theirs
    return [milliseconds(passes[name], 1, device)]
