"""Time the methods of ``dynamic_conv2d`` side by side: ``python -m experiments.benchmarks.methods``.

For each layer shape (3x3, 1x1 and depthwise, from large maps to small), a forward and backward pass of the static
convolution and of each method, interleaved, median of several rounds; K = 4, batch 32.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.functional import METHODS, choose_method, dynamic_conv2d
from experiments.benchmarks.timing import interleaved, versions

BATCH, KERNELS, ROUNDS = 32, 4, 5
# (in channels, out channels, kernel size, groups, map size), as in ResNet-18 and MobileNetV2 at 224 and at 32 px
SHAPES = [
    (64, 64, 3, 1, 56),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7),
    (64, 64, 3, 1, 8),
    (256, 256, 3, 1, 2),
    (24, 144, 1, 1, 56),
    (96, 576, 1, 1, 14),
    (576, 96, 1, 1, 14),
    (160, 960, 1, 1, 7),
    (96, 576, 1, 1, 2),
    (960, 160, 1, 1, 1),
    (576, 576, 3, 576, 14),
    (96, 96, 3, 96, 16),
]


def measure(in_channels: int, out_channels: int, size: int, groups: int, map_size: int) -> tuple[dict[str, float], str]:
    """Give milliseconds a forward and backward pass by method, and the method that auto takes."""
    x = torch.randn(BATCH, in_channels, map_size, map_size, requires_grad=True)
    routing = torch.softmax(torch.randn(BATCH, KERNELS), 1).requires_grad_()
    weight = torch.randn(KERNELS, out_channels, in_channels // groups, size, size, requires_grad=True)
    static = weight[0].detach().clone().requires_grad_()
    padding = size // 2

    def convolve(method: str) -> Tensor:
        if method == "static":
            return F.conv2d(x, static, None, 1, padding, 1, groups)
        return dynamic_conv2d(x, routing, weight, None, 1, padding, 1, groups, method=method)

    names = ("static", *METHODS)
    medians = interleaved({name: lambda name=name: convolve(name).sum().backward() for name in names}, ROUNDS)
    chosen = choose_method(x, weight, padding=(padding, padding), groups=groups)
    return medians, chosen


def main() -> None:
    """Print the table, then everything as JSON."""
    torch.manual_seed(0)
    print(
        f"{'in, out, kernel, groups, map':30}{'static ms':>10}" + "".join(f"{name:>10}" for name in METHODS) + "  auto"
    )
    results = []
    for shape in SHAPES:
        times, chosen = measure(*shape)
        ratios = "".join(f"{times[name] / times['static']:10.2f}" for name in METHODS)
        print(f"{shape!s:30}{times['static']:10.1f}{ratios}  {chosen}", flush=True)
        results.append({"shape": shape, "auto": chosen, **times})
    print("columns after static are times relative to it")
    print(json.dumps({"benchmark": "methods", "batch": BATCH, "kernels": KERNELS, **versions(), "results": results}))


if __name__ == "__main__":
    main()
