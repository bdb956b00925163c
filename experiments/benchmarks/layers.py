"""What folding saves, and involution's time and memory: ``python -m experiments.benchmarks.layers``.

DGConv (256 channels, 3x3, 28x28, batch 32) as the masked dense convolution that trains and as the grouped one that it
folds to; DO-Conv likewise, beside a plain convolution; involution (64 channels, 56x56, batch 8) beside the usual form
over an unfolded map. Interleaved, median of several rounds.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.cost import peak_bytes
from dyn_lightning.layers import DGConv2d, DOConv2d, Involution2d
from experiments.benchmarks.timing import interleaved, versions

ROUNDS = 9


@torch.no_grad()
def dg_conv(groups: int, seed: int) -> dict[str, float]:
    """Time a forward pass of the layer and of what it folds to; ``seed`` says which gates are closed."""
    layer = DGConv2d(256, 256, 3, padding=1, bias=False, gate_init="dense").eval()
    closed = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[: groups.bit_length() - 1]
    layer.gates[closed] *= -1
    folded, x = layer.fold(), torch.randn(32, 256, 28, 28)
    assert folded.groups == groups
    assert torch.allclose(folded(x), layer(x), atol=1e-4)
    return interleaved({"masked": lambda: layer(x), "folded": lambda: folded(x)}, ROUNDS)


@torch.no_grad()
def do_conv() -> dict[str, float]:
    """Time a forward pass of the layer, of what it folds to, and of a convolution that never was one."""
    layer, plain = DOConv2d(256, 256, 3, padding=1).eval(), nn.Conv2d(256, 256, 3, padding=1).eval()
    folded, x = layer.fold(), torch.randn(32, 256, 28, 28)
    assert torch.allclose(folded(x), layer(x), atol=1e-4)
    return interleaved({"layer": lambda: layer(x), "folded": lambda: folded(x), "plain": lambda: plain(x)}, ROUNDS)


def involution(kernel_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time a forward and backward pass, and give the peak memory in maps of the input's size."""
    layer = Involution2d(64, 64, kernel_size, padding=kernel_size // 2, bias=False)
    x = torch.randn(8, 64, 56, 56, requires_grad=True)

    def unfolded(x: Tensor) -> Tensor:
        kernels = layer.span(torch.relu(layer.norm(layer.reduce(x)))).unflatten(1, (4, 1, -1))
        patches = F.unfold(x, kernel_size, padding=kernel_size // 2).reshape(8, 4, 16, -1, 56, 56)
        return (kernels * patches).sum(3).flatten(1, 2)

    assert torch.allclose(unfolded(x), layer(x), atol=1e-4)
    forms = {"ours": layer, "unfolded": unfolded}
    peaks = {name: peak_bytes(lambda form=form: form(x).sum().backward()) for name, form in forms.items()}
    times = interleaved({name: lambda form=form: form(x).sum().backward() for name, form in forms.items()}, 5)
    return times, {name: peak / (x.numel() * x.element_size()) for name, peak in peaks.items()}


def main() -> None:
    """Print the results, then everything as JSON."""
    torch.manual_seed(0)
    results: dict[str, object] = {}
    for groups in (2, 8, 32, 256):
        times = dg_conv(groups, seed=groups)
        print(
            f"DGConv, {groups:3} groups: masked {times['masked']:6.1f} ms, folded {times['folded']:6.1f} ms, "
            f"{times['masked'] / times['folded']:5.2f} times as fast",
            flush=True,
        )
        results[f"dgconv_{groups}"] = times
    times = results["doconv"] = do_conv()
    print(
        f"DO-Conv: layer {times['layer']:.1f} ms, folded {times['folded']:.1f} ms, plain convolution "
        f"{times['plain']:.1f} ms; folded / plain {times['folded'] / times['plain']:.3f}"
    )
    for size in (3, 7):
        times, maps = involution(size)
        print(
            f"Involution, {size}x{size}: ours {times['ours']:.0f} ms and {maps['ours']:.1f} maps at the peak, unfolded "
            f"{times['unfolded']:.0f} ms and {maps['unfolded']:.1f} maps",
            flush=True,
        )
        results[f"involution_{size}"] = {"milliseconds": times, "peak_maps": maps}
    print(json.dumps({"benchmark": "layers", **versions(), "results": results}))


if __name__ == "__main__":
    main()
