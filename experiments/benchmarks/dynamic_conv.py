"""How fast is the per-sample convolution? ``python -m experiments.benchmarks.dynamic_conv [layers|networks|growth]``.

Question: what do dynamic convolutions cost beside static ones, by each method, by the one that is chosen, and by timm's
``CondConv2d``, the public peer that puts the batch into the groups of one convolution?

Side by side in one run, interleaved, medians; ``layers``: each layer shape of MobileNetV2, ResNet-18, ResNet-50
and EfficientNet-B0 at 224 and 32 px (forward and backward pass of a batch of 32, forward pass of 32 and of 1).
``networks``: these networks whole (training step with SGD of a batch of 32, forward pass of 32 and of 1), and the peak
memory. ``growth``: the training step of ResNet-18 at 32 px over K and the batch. About 15, 25 and 5 minutes on two
cores. Prints tables, draws a plot for each part into ``--out``, and ends with one line of JSON.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dyn_lightning.convert import convert
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import CondConv2d
from dyn_lightning.routing import SoftmaxAttention
from experiments.benchmarks.timing import interleaved, peak_bytes, versions

KERNELS, BATCH = 4, 32
SIZES = (224, 32)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2 x0.5": partial(torchvision.models.mobilenet_v2, width_mult=0.5),
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "EfficientNet-B0": partial(timm.create_model, "efficientnet_b0"),
}
# (batch, whether there is a backward pass)
JOBS = {"training step": (BATCH, True), "forward": (BATCH, False), "forward of one": (1, False)}
OURS = ("grouped", "matmul", "mixture", "chunked")
COLUMNS = ("static", *OURS, "timm")
Shape = tuple[int, int, int, int, int, int, int]  # channels in, out, kernel size, stride, padding, groups, map size


class PeerConv2d(nn.Module):
    """timm's ``CondConv2d`` with Dynamic Convolution's attention, as a drop-in for ``nn.Conv2d``."""

    def __init__(self, *args: Any, num_kernels: int, **options: Any) -> None:
        super().__init__()
        self.router = SoftmaxAttention(args[0] if args else options["in_channels"], num_kernels, 4, 30.0)
        self.conv = timm.layers.CondConv2d(*args, **options, num_experts=num_kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        return self.conv(x, self.router(x))


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


def measure_layer(shape: Shape, batch: int, training: bool, place: Any) -> tuple[dict[str, float], str]:
    """Give the milliseconds of each method, and the method that auto takes."""
    in_channels, out_channels, size, stride, padding, groups, pixels = shape
    kernels = place.kernels
    x = torch.randn(batch, in_channels, pixels, pixels, device=place.device).requires_grad_(training)
    routing = torch.softmax(torch.randn(batch, kernels, device=place.device), 1).requires_grad_(training)
    stacked = (kernels, out_channels, in_channels // groups, size, size)
    weight = torch.randn(stacked, device=place.device).requires_grad_(training)
    static = weight[0].detach().clone().requires_grad_(training)
    geometry = (stride, padding, 1, groups)
    peer = timm.layers.CondConv2d(in_channels, out_channels, size, stride, padding, 1, groups, num_experts=kernels).to(
        place.device
    )
    peer.weight.requires_grad_(training)

    def compute(name: str) -> None:
        with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
            if name == "static":
                y, leaves = F.conv2d(x, static, None, *geometry), [x, static]
            elif name == "timm":
                y, leaves = peer(x, routing), [x, routing, peer.weight]
            else:
                y, leaves = dynamic_conv2d(x, routing, weight, None, *geometry, method=name), [x, routing, weight]
        if training:
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    with torch.set_grad_enabled(training):
        times = interleaved({name: partial(compute, name) for name in COLUMNS}, place.rounds, place.device, patience=4)
    return times, choose_method(x.to(place.dtype), weight.to(place.dtype), *geometry, training=training)


def layers(place: Any) -> list[dict[str, Any]]:
    """Measure every layer shape at every job, and say how good the choices are."""
    results = []
    for job, (batch, training) in JOBS.items():
        print(f"\n{job}, batch {batch}: milliseconds of the static convolution, then times relative to it")
        print(f"{'in, out, kernel, stride, padding, groups, map':48}{'static':>9}" + _head(COLUMNS[1:]) + "  auto")
        for shape, networks in place.shapes.items():
            times, chosen = measure_layer(shape, batch, training, place)
            ratios = "".join(f"{times[name] / times['static']:9.2f}" for name in COLUMNS[1:])
            print(f"{shape!s:48}{times['static']:9.2f}{ratios}  {chosen}", flush=True)
            about = {"job": job, "batch": batch, "training": training, "shape": shape, "networks": networks}
            results.append({**about, "auto": chosen, "milliseconds": times})
        print(quality([result for result in results if result["job"] == job]))
    return results


def quality(results: list[dict[str, Any]]) -> str:
    """Say how far the chosen methods are from the best ones and from timm's layer."""
    over = sorted(_chosen(result) / min(result["milliseconds"][name] for name in OURS) for result in results)
    peer = sorted(result["milliseconds"]["timm"] / _chosen(result) for result in results)
    near = sum(ratio <= 1.1 for ratio in over) / len(over)
    mean = math.exp(sum(map(math.log, peer)) / len(peer))
    return (
        f"auto: within 10 % of the best method on {near:.1%} of {len(over)} shapes, at most {over[-1]:.2f} times it; "
        f"{mean:.2f} times as fast as timm's CondConv2d (geometric mean; least {peer[0]:.2f}, most {peer[-1]:.1f})"
    )


def _chosen(result: dict[str, Any]) -> float:
    return result["milliseconds"][result["auto"]]


def _head(names: tuple[str, ...]) -> str:
    return "".join(f"{name:>9}" for name in names)


def make_step(model: nn.Module, batch: int, training: bool, size: int, place: Any) -> Callable[[], None]:
    """Make a training step with SGD, or a forward pass in eval mode."""
    model = model.to(place.device).train(training)
    if place.channels_last:
        model = model.to(memory_format=torch.channels_last)
    x, labels = torch.randn(batch, 3, size, size, device=place.device), torch.arange(batch, device=place.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32),
        ):
            logits = model(x)
        if training:
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

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


def networks(place: Any) -> list[dict[str, Any]]:
    """Measure whole networks, time and peak memory."""
    results = []
    names = (*COLUMNS, "auto")
    for job, (batch, training) in JOBS.items():
        batch = place.batch if batch > 1 else 1
        print(f"\n{job}, batch {batch}: milliseconds and MiB of the static network, then relative to it")
        print(f"{'network':26}{'':>8}{'static':>9}" + _head(names[1:]))
        for size in place.sizes:
            for network in place.networks:
                build = NETWORKS[network]
                steps = {
                    name: make_step(converted(build, name, place.kernels), batch, training, size, place)
                    for name in names
                }
                times = interleaved(steps, place.rounds, place.device, patience=4)
                peaks = {name: peak_bytes(step, place.device) / 2**20 for name, step in steps.items()}
                for unit, values in (("ms", times), ("MiB", peaks)):
                    ratios = "".join(f"{values[name] / values['static']:9.2f}" for name in names[1:])
                    print(f"{f'{network}, {size} px':26}{unit:>8}{values['static']:9.1f}{ratios}", flush=True)
                results.append({"job": job, "network": network, "size": size, "milliseconds": times, "MiB": peaks})
    return results


def growth(place: Any) -> list[dict[str, Any]]:
    """Measure the training step of ResNet-18 at 32 px over the number of kernels and the batch."""
    results = []
    batches, numbers = (8, 32, 128, 256), (1, 2, 4, 8, 16)
    print("\nResNet-18, 32 px, training step: milliseconds of the static network, then relative to it by K")
    print(f"{'batch':8}{'static':>9}" + _head(tuple(f"K = {kernels}" for kernels in numbers)))
    for batch in batches:
        build = NETWORKS["ResNet-18"]
        steps = {"static": make_step(build(), batch, True, 32, place)}
        steps |= {
            f"{kernels}": make_step(converted(build, "auto", kernels), batch, True, 32, place) for kernels in numbers
        }
        times = interleaved(steps, place.rounds, place.device)
        ratios = "".join(f"{times[f'{kernels}'] / times['static']:9.2f}" for kernels in numbers)
        print(f"{batch:<8}{times['static']:9.1f}{ratios}", flush=True)
        results.append({"batch": batch, "milliseconds": times})
    return results


PARTS = {"layers": layers, "networks": networks, "growth": growth}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, draw the plots, then print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of which the median is given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is by autocast")
    parser.add_argument("--kernels", type=int, default=KERNELS, help="K")
    parser.add_argument("--batch", type=int, default=BATCH, help="of the networks")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="of networks", metavar="NAME"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the networks' images, in pixels")
    parser.add_argument("--channels_last", action="store_true", help="of the networks")
    parser.add_argument("--out", type=Path, help="folder for the plots and the JSON")
    place = parser.parse_args(arguments)
    unknown = sorted(set(place.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts {unknown} do not exist, choose of {[*PARTS]}")
    place.dtype = getattr(torch, place.dtype)
    place.shapes = shapes() if "layers" in (place.parts or PARTS) else {}
    torch.manual_seed(0)
    results = {part: PARTS[part](place) for part in place.parts or PARTS}
    settings = {"dtype": str(place.dtype), "batch": place.batch, "kernels": place.kernels, "rounds": place.rounds}
    line = json.dumps({"benchmark": "dynamic_conv", **settings, **versions(place.device), "results": results})
    if place.out:
        place.out.mkdir(parents=True, exist_ok=True)
        (place.out / "dynamic_conv.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
