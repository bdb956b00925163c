"""The training step of ResNet-18 at 32 px over K and the batch, and what explains it."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.cost import evaluating, methods, parameters
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample.reduction import plan_of
from experiments.benchmarks.dynamic_conv.networks import NETWORKS, converted, head, in_processes, spread
from experiments.benchmarks.timing import medians

NETWORK, KERNELS, BATCHES, SIZE = "ResNet-18", (1, 2, 4, 8, 16), (8, 32, 128, 256), 32


def growth(options: Any) -> list[dict[str, Any]]:
    """Measure the training step of ResNet-18 at 32 px over K and the batch, and explain it by what there is to do."""
    results: list[dict[str, Any]] = []
    columns = {"static": ("static", 1)} | {f"K = {kernels}": ("auto", kernels) for kernels in KERNELS}
    print(f"\n{NETWORK}, {SIZE} px, training step: milliseconds of the static network, then relative to it by K")
    print(f"{'batch':8}" + head([*columns]))
    for batch in BATCHES:
        steps, _ = in_processes(columns, NETWORK, SIZE, batch, True, options, patience=math.inf)
        times = medians(steps)
        ratios = "".join(f"{times[name] / times['static']:9.2f}" for name in [*columns][1:])
        print(f"{batch:<8}{times['static']:9.1f}{ratios}", flush=True)
        models = {name: converted(NETWORKS[NETWORK], *column).to(options.device) for name, column in columns.items()}
        work = {name: work_of(model, batch, options.device) for name, model in models.items()}
        results.append({"batch": batch, "milliseconds": times, "spread": spread(steps), "work": work})
    print(explained(results))
    return results


def work_of(model: nn.Module, batch: int, device: torch.device) -> dict[str, float]:
    """Count what a training step has to do; "images" stands for all that grows with them alone."""
    taken, mixed = methods(model, (3, SIZE, SIZE), batch), 0

    def count(name: str, layer: DynamicConv2d, inputs: tuple[Tensor, ...]) -> None:
        nonlocal mixed
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        computed = plan_of(inputs[0].shape, layer.weight.shape, *geometry, training=True).weight
        mixed += 0 if taken[name] == "mixture" else batch * math.prod(computed[1:])

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicConv2d)}
    hooks = [layer.register_forward_pre_hook(partial(count, name)) for name, layer in layers.items()]
    images, labels = torch.zeros(batch, 3, SIZE, SIZE, device=device), torch.zeros(batch, device=device).long()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops})
    with evaluating(model), counter:
        F.cross_entropy(model(images), labels).backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    products = counter.get_total_flops() / 2
    return {"weights": parameters(model), "mixed weights": mixed, "multiply-adds": products, "images": batch}


def backward_flops(grad: Any, x: Any, weight: Any, *settings: Any, **_: Any) -> int:
    """Count each gradient of a convolution like its forward pass; torch forgets the groups in one of them."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(settings[7][:2])


def explained(results: list[dict[str, Any]]) -> str:
    """Fit the times as a line in the work, with no negative number, and say how well it fits and what it is made of."""
    rows = [(list(r["work"][name].values()), time) for r in results for name, time in r["milliseconds"].items()]
    work, times = np.array([numbers for numbers, _ in rows]), np.array([time for _, time in rows])
    costs = nnls(work / times[:, None], np.ones(len(rows)))[0]
    errors = np.abs(work @ costs / times - 1)
    units = zip(("a weight", "a weight of the mixed kernels", "a multiply-add", "an image"), costs * 1e6, strict=True)
    lines = [
        "time = " + " + ".join(f"{nanoseconds:.3g} ns {unit}" for unit, nanoseconds in units),
        f"error {np.median(errors):.0%} (median), {errors.max():.0%} (most)",
    ]
    # A weight is read and its gradient written, and SGD with momentum passes over five numbers. A mixed weight is
    # written, read and read again, its gradient written and read twice; nothing of that need leave the cache.
    for name, index, least in (("a weight", 0, 28), ("a weight of the mixed kernels", 1, 24)):
        if costs[index]:
            lines.append(f"{name}: at least {least} bytes in float32, at {least / costs[index] / 1e6:.1f} GB/s")
    if costs[2]:
        lines.append(f"multiply-adds: {1 / costs[2] / 1e6:.0f} G a second")
    for result in results:
        for name in (f"K = {KERNELS[2]}", f"K = {KERNELS[-1]}"):
            parts = np.array(list(result["work"][name].values())) * costs
            shares = zip(result["work"][name], parts / parts.sum(), strict=True)
            listed = ", ".join(f"{part} {share:.0%}" for part, share in shares)
            lines.append(f"batch {result['batch']}, {name}: {listed}")
    return "\n".join(lines)
