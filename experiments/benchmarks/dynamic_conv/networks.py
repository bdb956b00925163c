"""Whole networks: a training step with SGD of a batch, forward passes of a batch and of one, and the peak memory.

Each network lives in a process of its own, as in training: in one, its time would depend on the memory that the others
left. The processes take their steps in turn, since a machine's speed may change from minute to minute, and hand back
what memory they can after each turn, since all of them live at once. With one image our methods share a network and its
process: two processes of one and the same method differ by up to a fifth there, more than the methods do.
"""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.convert import convert
from dyn_lightning.cost import peak_bytes
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample.by_name import has_triton
from dyn_lightning.per_sample.geometry import Geometry
from dyn_lightning.per_sample.layout import is_channels_last
from dyn_lightning.per_sample.mixed import why_not
from dyn_lightning.per_sample.native import is_compiled
from dyn_lightning.routing import SoftmaxAttention
from experiments.benchmarks.timing import give_back_memory, in_turn, medians, milliseconds

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2 x0.5": partial(torchvision.models.mobilenet_v2, width_mult=0.5),
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "EfficientNet-B0": partial(timm.create_model, "efficientnet_b0"),
}
JOBS = {"training step": (0, True), "forward": (0, False), "forward of one": (1, False)}  # batch (0: --batch), training
# What a process takes in its first turn, after two steps that are not counted: at least so many steps and milliseconds.
# Later turns have as many steps, so that all count alike in the median: one in which the machine is fast had more.
LEAST_STEPS, TURN = 3, 500


def prepare(options: Any) -> None:
    """Set up a process as the commands do: its threads, its memory, its device, and products as cuDNN's convolutions
    have them by default.
    """
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
        torch.set_float32_matmul_precision("high")


class PeerConv2d(nn.Module):
    """timm's ``CondConv2d`` with Dynamic Convolution's attention, as a drop-in for ``nn.Conv2d``."""

    def __init__(self, num_kernels: int, **options: Any) -> None:
        super().__init__()
        self.router = SoftmaxAttention(options["in_channels"], num_kernels, 4, 30.0)
        self.conv = timm.layers.CondConv2d(**options, num_experts=num_kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        return self.conv(x, self.router(x))


def names(options: Any) -> list[str]:
    """Name what is measured on a device beside the one that is chosen."""
    triton = ["triton"] if options.device.type == "cuda" and has_triton() else []
    cpp = ["cpp"] if options.device.type == "cpu" and options.dtype == torch.float32 and is_compiled() else []
    return ["static", "grouped", "matmul", "mixture", "chunked", *cpp, *triton, "timm"]


def head(columns: list[str]) -> str:
    """Give the heads of a table's columns."""
    return "".join(f"{name:>9}" for name in columns)


def make_step(model: nn.Module, batch: int, training: bool, size: int, options: Any) -> Callable[[], None]:
    """Make a training step with SGD, or a forward pass in eval mode."""
    model = model.to(options.device).train(training)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    x = torch.randn(batch, 3, size, size, device=options.device)
    labels = torch.arange(batch, device=options.device) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(options.device.type, options.dtype, enabled=options.dtype != torch.float32),
        ):
            logits = model(x)
        if training:
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def converted(build: Callable[[], nn.Module], name: str, kernels: int) -> nn.Module:
    """Build a network with static convolutions, timm's, or ours by a method."""
    torch.manual_seed(0)
    model = build()
    if name == "timm":
        convert(model, PeerConv2d, num_kernels=kernels)
    elif name != "static":
        convert(model, "dynamic", num_kernels=kernels, method=name)
    return model


class Stepping:
    """A network that takes its steps in a process of its own.

    Args:
        settings: what ``_begin`` takes.
    """

    def __init__(self, *settings: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.process = ProcessPoolExecutor(1, context, _begin, settings)

    def __enter__(self) -> "Stepping":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.shutdown()

    def times(self, name: str) -> list[float]:
        """Give the milliseconds of one turn's steps by a method."""
        return self.process.submit(_times, name).result()

    def peak(self, name: str) -> float:
        """Give the MiB that a step by a method takes beyond parameters and momentum."""
        return self.process.submit(_peak, name).result()


_here: dict[str, Any] = {}  # what a process of its own has: the network, its step and its device


def _begin(network: str, name: str, kernels: int, size: int, batch: int, training: bool, options: Any) -> None:
    prepare(options)
    model = converted(NETWORKS[network], name, kernels)
    _here.update(model=model, step=make_step(model, batch, training, size, options), device=options.device, counts={})


def _use(name: str) -> None:
    """Have our layers compute by a method, or as groups where ``cpp`` does not compute them."""
    layers = [layer for layer in _here["model"].modules() if isinstance(layer, DynamicConv2d)]
    if name == "cpp" and "unable" not in _here:
        _here["unable"] = _unable(layers)
    for layer in layers:
        layer.method = "grouped" if name == "cpp" and layer in _here["unable"] else name


def _unable(layers: list[DynamicConv2d]) -> set[DynamicConv2d]:
    """Find the layers that ``cpp`` does not compute, in a step, which shows them their inputs."""
    found: set[DynamicConv2d] = set()

    def look(layer: DynamicConv2d, inputs: tuple[Tensor]) -> None:
        (x,), weight = inputs, layer.weight
        geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
        if why_not(x.shape, weight.shape, geometry, weight.dtype, weight.device.type, is_channels_last(x)):
            found.add(layer)

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    for layer in layers:
        layer.method = "grouped"  # which computes any
    with torch.compiler.set_stance("force_eager"):
        _here["step"]()
    for hook in hooks:
        hook.remove()
    return found


def _times(name: str) -> list[float]:
    _use(name)
    step, device, counts = _here["step"], _here["device"], _here["counts"]
    for _ in range(2):  # fetch the memory that it gave back, most of it in the first
        step()
    times: list[float] = []
    while len(times) < counts.get(name, LEAST_STEPS) or (name not in counts and sum(times) < TURN):
        times.append(milliseconds(step, 1, device))
    counts[name] = len(times)
    give_back_memory(device)
    return times


def _peak(name: str) -> float:
    _use(name)
    peak = peak_bytes(_here["step"], _here["device"])
    give_back_memory(_here["device"])
    return round(peak / 2**20, 1)


def in_processes(
    columns: Mapping[str, tuple[str, int]],
    network: str,
    size: int,
    batch: int,
    training: bool,
    options: Any,
    patience: float = 4,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Give the milliseconds of all steps and the MiB of each (method, K); ``patience`` as in ``in_turn``."""

    def network_of(name: str) -> str:
        return "auto" if batch == 1 and name not in ("static", "timm") else name

    def turn(column: str) -> list[float]:
        process, name = stepping[column]
        return process.times(name)

    with ExitStack() as stack:
        processes = {
            which: stack.enter_context(Stepping(network, *which, size, batch, training, options))
            for which in {(network_of(name), kernels) for name, kernels in columns.values()}
        }
        stepping = {column: (processes[network_of(name), kernels], name) for column, (name, kernels) in columns.items()}
        times = in_turn(turn, [*columns], options.rounds, patience)
        return times, {column: process.peak(name) for column, (process, name) in stepping.items()}


def spread(steps: dict[str, list[float]]) -> dict[str, tuple[int, float, float]]:
    """Give the number of each one's steps, and their quartiles."""
    quartiles = {name: np.quantile(times, (0.25, 0.75)).round(4).tolist() for name, times in steps.items()}
    return {name: (len(steps[name]), lower, upper) for name, (lower, upper) in quartiles.items()}


def networks(options: Any) -> list[dict[str, Any]]:
    """Measure whole networks, time and peak memory."""
    results = []
    columns = [*names(options), "auto"]
    for job, (batch, training) in JOBS.items():
        if job not in options.jobs:
            continue
        batch = batch or options.batch
        print(
            f"\n{job}, batch {batch}: milliseconds of the static network, and MiB beyond parameters and momentum, then "
            "relative to it; auto / best method"
        )
        print(f"{'network':26}{'':>5}{'static':>9}" + head(columns[1:]) + f"{'of best':>9}")
        for size in options.sizes:
            for network in options.networks:
                models = {name: (name, options.kernels) for name in columns}
                steps, peaks = in_processes(models, network, size, batch, training, options)
                times = medians(steps)
                best = min(time for name, time in times.items() if name not in ("static", "timm"))
                for unit, values in (("ms", times), ("MiB", peaks)):
                    ratios = "".join(f"{values[name] / values['static']:9.2f}" for name in columns[1:])
                    last = f"{times['auto'] / best:9.2f}" if unit == "ms" else ""
                    print(f"{f'{network}, {size} px':26}{unit:>5}{values['static']:9.1f}{ratios}{last}", flush=True)
                about = {"job": job, "batch": batch, "network": network, "size": size}
                results.append({**about, "milliseconds": times, "spread": spread(steps), "MiB": peaks})
    return results
