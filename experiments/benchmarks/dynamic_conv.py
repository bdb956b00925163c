"""How fast is the per-sample convolution?

    python -m experiments.benchmarks.dynamic_conv [layers] [networks] [growth] [modes] --out FOLDER

Question: what do dynamic convolutions cost beside static ones, by each method, by the one that is chosen, and by timm's
``CondConv2d``, the public peer that puts the batch into the groups of one convolution?

Side by side in one run, interleaved, medians. ``layers``: each layer shape of MobileNetV2, ResNet-18, ResNet-50 and
EfficientNet-B0 at 224 and 32 px (forward and backward pass of a batch of 32, forward pass of 32 and of 1; no router, no
optimizer). ``networks``: these networks whole (training step with SGD of a batch of 32, forward pass of 32 and of 1),
and the peak memory. ``growth``: the training step of ResNet-18 at 32 px over K and the batch, and what explains it.
``modes``: single layers in channels_last, in bfloat16 and compiled. About 15, 40, 3 and 2 minutes on two cores. Prints
tables, draws a plot of each of the first three parts into ``--out``, and ends with one line of JSON.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.convert import convert
from dyn_lightning.cost import methods, parameters, peak_bytes
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.per_sample.choice import has_triton
from dyn_lightning.routing import SoftmaxAttention
from experiments.benchmarks.plots import draw
from experiments.benchmarks.timing import interleaved, versions

KERNELS, BATCH = 4, 32
SIZES = (224, 32)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2 x0.5": partial(torchvision.models.mobilenet_v2, width_mult=0.5),
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "EfficientNet-B0": partial(timm.create_model, "efficientnet_b0"),
}
# (batch, 0 for that of the options, whether there is a backward pass)
JOBS = {"forward and backward": (0, True), "forward": (0, False), "forward of one": (1, False)}
OURS = ("grouped", "matmul", "mixture", "chunked")
GROWTH_KERNELS, GROWTH_BATCHES = (1, 2, 4, 8, 16), (8, 32, 128, 256)
Shape = tuple[int, int, int, int, int, int, int]  # channels in, out, kernel size, stride, padding, groups, map size
MODE_SHAPES: list[Shape] = [
    (128, 128, 3, 1, 1, 1, 28),
    (256, 256, 3, 1, 1, 1, 14),
    (256, 256, 3, 1, 1, 1, 2),
    (24, 144, 1, 1, 0, 1, 56),
    (960, 160, 1, 1, 0, 1, 7),
    (144, 144, 3, 1, 1, 144, 56),
]


class PeerConv2d(nn.Module):
    """timm's ``CondConv2d`` with Dynamic Convolution's attention, as a drop-in for ``nn.Conv2d``."""

    def __init__(self, *args: Any, num_kernels: int, **options: Any) -> None:
        super().__init__()
        self.router = SoftmaxAttention(args[0] if args else options["in_channels"], num_kernels, 4, 30.0)
        self.conv = timm.layers.CondConv2d(*args, **options, num_experts=num_kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        return self.conv(x, self.router(x))


def columns(options: Any) -> tuple[str, ...]:
    """Name what is measured on a device."""
    ours = (*OURS, "triton") if options.device.type == "cuda" and has_triton() else OURS
    return ("static", *ours, "timm")


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


def measure_layer(shape: Shape, batch: int, training: bool, options: Any) -> tuple[dict[str, float], str]:
    """Give the milliseconds of each method, and the method that auto takes."""
    in_channels, out_channels, size, stride, padding, groups, pixels = shape
    kernels = options.kernels
    x = torch.randn(batch, in_channels, pixels, pixels, device=options.device).requires_grad_(training)
    routing = torch.softmax(torch.randn(batch, kernels, device=options.device), 1).requires_grad_(training)
    stacked = (kernels, out_channels, in_channels // groups, size, size)
    weight = torch.randn(stacked, device=options.device).requires_grad_(training)
    static = weight[0].detach().clone().requires_grad_(training)
    geometry = (stride, padding, 1, groups)
    peer = timm.layers.CondConv2d(in_channels, out_channels, size, stride, padding, 1, groups, num_experts=kernels).to(
        options.device
    )
    peer.weight.requires_grad_(training)

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
        times = interleaved(
            {name: partial(compute, name) for name in columns(options)}, options.rounds, options.device, 4, 5
        )
    return times, choose_method(x.to(options.dtype), weight.to(options.dtype), *geometry, training=training)


def layers(options: Any) -> list[dict[str, Any]]:
    """Measure every layer shape at every job, and say how good the choices are."""
    results = []
    names = columns(options)[1:]
    for job, (batch, training) in JOBS.items():
        batch = batch or options.batch
        print(f"\n{job}, batch {batch}: milliseconds of the static convolution, then times relative to it")
        print(f"{'in, out, kernel, stride, padding, groups, map':48}{'static':>9}" + _head(names) + "  auto")
        for shape, networks in options.shapes.items():
            times, chosen = measure_layer(shape, batch, training, options)
            ratios = "".join(f"{times[name] / times['static']:9.2f}" for name in names)
            print(f"{shape!s:48}{times['static']:9.2f}{ratios}  {chosen}", flush=True)
            about = {"job": job, "batch": batch, "training": training, "shape": shape, "networks": networks}
            results.append({**about, "auto": chosen, "milliseconds": times})
        print(quality([result for result in results if result["job"] == job]))
    return results


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


def _head(names: Iterable[str]) -> str:
    return "".join(f"{name:>9}" for name in names)


def make_step(model: nn.Module, batch: int, training: bool, size: int, options: Any) -> Callable[[], None]:
    """Make a training step with SGD, or a forward pass in eval mode."""
    model = model.to(options.device).train(training)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    x, labels = torch.randn(batch, 3, size, size, device=options.device), torch.arange(batch, device=options.device)
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


def networks(options: Any) -> list[dict[str, Any]]:
    """Measure whole networks, time and peak memory."""
    results = []
    names = (*columns(options), "auto")
    for job, (batch, training) in JOBS.items():
        batch, job = batch or options.batch, "training step" if training else job
        print(f"\n{job}, batch {batch}: milliseconds and MiB of the static network, then relative to it")
        print(f"{'network':26}{'':>8}{'static':>9}" + _head(names[1:]))
        for size in options.sizes:
            for network in options.networks:
                build = NETWORKS[network]
                steps = {
                    name: make_step(converted(build, name, options.kernels), batch, training, size, options)
                    for name in names
                }
                times = interleaved(steps, options.rounds, options.device, patience=4, settle=True)
                peaks = {name: round(peak_bytes(step, options.device) / 2**20, 1) for name, step in steps.items()}
                for unit, values in (("ms", times), ("MiB", peaks)):
                    ratios = "".join(f"{values[name] / values['static']:9.2f}" for name in names[1:])
                    print(f"{f'{network}, {size} px':26}{unit:>8}{values['static']:9.1f}{ratios}", flush=True)
                about = {"job": job, "batch": batch, "network": network, "size": size}
                results.append({**about, "milliseconds": times, "MiB": peaks})
    return results


def growth(options: Any) -> list[dict[str, Any]]:
    """Measure the training step of ResNet-18 at 32 px over K and the batch, and explain it by what there is to do."""
    results: list[dict[str, Any]] = []
    build = NETWORKS["ResNet-18"]
    print("\nResNet-18, 32 px, training step: milliseconds of the static network, then relative to it by K")
    print(f"{'batch':8}{'static':>9}" + _head([f"K = {kernels}" for kernels in GROWTH_KERNELS]))
    for batch in GROWTH_BATCHES:
        models = {"static": build()} | {f"K = {k}": converted(build, "auto", k) for k in GROWTH_KERNELS}
        work = {name: work_of(model, batch) for name, model in models.items()}
        steps = {name: make_step(model, batch, True, 32, options) for name, model in models.items()}
        times = interleaved(steps, options.rounds, options.device, settle=True)
        ratios = "".join(f"{times[name] / times['static']:9.2f}" for name in steps if name != "static")
        print(f"{batch:<8}{times['static']:9.1f}{ratios}", flush=True)
        results.append({"batch": batch, "milliseconds": times, "work": work})
    print(explained(results))
    return results


def work_of(model: nn.Module, batch: int) -> dict[str, float]:
    """Count what a training step at 32 px has to do; "images" stands for all that grows with them alone."""
    taken = methods(model, (3, 32, 32), batch)
    mixed = sum(
        batch * layer.weight[0].numel()
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicConv2d) and taken[name] != "mixture"
    )
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}
    ) as counter:
        F.cross_entropy(model(torch.zeros(batch, 3, 32, 32)), torch.zeros(batch).long()).backward()
    model.zero_grad()
    counted = counter.get_total_flops() / 2
    return {"weights": parameters(model), "mixed weights": mixed, "multiply-adds": counted, "images": batch}


def backward_flops(grad: Any, x: Any, weight: Any, *settings: Any, **_: Any) -> int:
    """Count each gradient of a convolution like its forward pass; torch forgets the groups in one of them."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(settings[7][:2])


def explained(results: list[dict[str, Any]]) -> str:
    """Fit the times as a line in the work, with no negative number, and say how well it fits."""
    rows = [(list(r["work"][name].values()), time) for r in results for name, time in r["milliseconds"].items()]
    numbers = np.array([work for work, _ in rows])
    times = np.array([time for _, time in rows])
    costs = nnls(numbers / times[:, None], np.ones(len(rows)))[0]
    errors = np.abs(numbers @ costs / times - 1)
    per_weight, per_mixed, per_product, per_image = costs
    shares = (numbers * costs)[-1] / (numbers @ costs)[-1]
    listed = ", ".join(f"{name} {share:.0%}" for name, share in zip(results[0]["work"]["static"], shares, strict=True))
    return (
        f"time = {per_weight * 1e6:.2f} ns a weight + {per_mixed * 1e6:.2f} ns a weight of the mixed kernels + "
        f"{per_product * 1e9:.1f} ps a multiply-add + {per_image:.2f} ms an image\n"
        f"error {np.median(errors):.0%} (median), {errors.max():.0%} (most); of the last point: {listed}\n"
        "A weight is read and its gradient written, and SGD with momentum passes over five numbers: at least 28 bytes, "
        f"{28 / max(per_weight, 1e-12) / 1e6:.1f} GB/s."
    )


def modes(options: Any) -> list[dict[str, Any]]:
    """Measure the training step of single layers as they are, in channels_last, in bfloat16 and compiled."""
    results = []
    names = ("plain", "channels_last", "bfloat16", "compiled")
    print("\nmilliseconds of a forward and backward pass of DynamicConv2d, then relative to it, and nn.Conv2d likewise")
    print(f"{'in, out, kernel, stride, padding, groups, map':48}{'':>8}{'plain':>9}" + _head(names[1:]))
    for shape in MODE_SHAPES:
        in_channels, out_channels, *geometry, groups, pixels = shape
        arguments = (in_channels, out_channels, *geometry, 1, groups, False)
        for kind, layer in (("dynamic", DynamicConv2d(*arguments)), ("static", nn.Conv2d(*arguments))):
            x = torch.randn(options.batch, in_channels, pixels, pixels, device=options.device, requires_grad=True)
            last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            layer = layer.to(options.device)
            passes = {
                "plain": partial(both_passes, layer, x),
                "channels_last": partial(both_passes, copy.deepcopy(layer).to(memory_format=torch.channels_last), last),
                "bfloat16": partial(both_passes, layer, x, torch.bfloat16),
                "compiled": partial(both_passes, torch.compile(copy.deepcopy(layer), fullgraph=True), x),
            }
            times = interleaved(passes, options.rounds, options.device)
            ratios = "".join(f"{times[name] / times['plain']:9.2f}" for name in names[1:])
            print(f"{shape!s:48}{kind:>8}{times['plain']:9.2f}{ratios}", flush=True)
            results.append({"shape": shape, "layer": kind, "milliseconds": times})
    return results


def both_passes(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Run a layer forward and backward."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


PARTS = {"layers": layers, "networks": networks, "growth": growth, "modes": modes}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, draw the plots, then print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of which the median is given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is by autocast")
    parser.add_argument("--kernels", type=int, default=KERNELS, help="K")
    parser.add_argument("--batch", type=int, default=BATCH, help="of layers, networks and modes")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="of networks", metavar="NAME"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the networks' images, in pixels")
    parser.add_argument("--channels_last", action="store_true", help="of the networks")
    parser.add_argument("--out", type=Path, help="folder for the plots and the JSON")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts {unknown} do not exist, choose of {[*PARTS]}")
    options.dtype = getattr(torch, options.dtype)
    options.shapes = shapes() if "layers" in (options.parts or PARTS) else {}
    torch.manual_seed(0)
    results = {part: PARTS[part](options) for part in options.parts or PARTS}
    settings = {
        "dtype": str(options.dtype),
        "batch": options.batch,
        "kernels": options.kernels,
        "rounds": options.rounds,
    }
    line = json.dumps({"benchmark": "dynamic_conv", **settings, **versions(options.device), "results": results})
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "dynamic_conv.json").write_text(line + "\n")
        draw(json.loads(line), options.out)
    print(line)


if __name__ == "__main__":
    main()
