import math
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnext50_32x4d

from dyn_lightning.convert import convert
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.layers import DGConv2d
from dyn_lightning.protocols import Foldable, Grouped
from tests.contract import LayerContract
from tests.noise import fill_with_noise_
from tests.reference_vectors import assert_equals_reference
from tests.tolerances import assert_close

NAMES = {"gate": "gates", "conv.weight": "weight", "conv.bias": "bias"}


def digits(number: int, factors: list[int]) -> list[int]:
    """Write a number in mixed radix, the first factor's digit first."""
    found = []
    for factor in reversed(factors):
        number, digit = divmod(number, factor)
        found.append(digit)
    return found[::-1]


class TestDGConv2d(LayerContract):
    layer = DGConv2d
    geometry: ClassVar = {"in_channels": 12, "out_channels": 18, "kernel_size": 3}
    straight_through = ("gates",)
    takes_one_image = True

    def noisy(self, dtype: torch.dtype = torch.float64, seed: int = 0, **kw: Any) -> nn.Module:
        """With the first gate open and the second closed, or the other way round."""
        layer = super().noisy(dtype, seed, **kw)
        with torch.no_grad():
            for k, gate in enumerate(layer.gates):
                gate.copy_(gate.abs() * (-1) ** (k + seed))
        return layer

    def excluded(self, **geometry: Any) -> str:
        if geometry["groups"] != 1:
            return f"groups={geometry['groups']} must be 1, since the layer learns them; from_conv takes a grouped one"
        if math.gcd(geometry["in_channels"], geometry["out_channels"]) == 1:
            return (
                f"in_channels={geometry['in_channels']} and out_channels={geometry['out_channels']} must have a common "
                "factor, or there are no groups to learn: use nn.Conv2d"
            )
        return ""

    def excluded_conv(self, **geometry: Any) -> str:
        return self.excluded(**geometry | {"groups": 1})

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        kernel = layer.weight.clone()
        common = math.gcd(layer.in_channels, layer.out_channels)
        for o in range(layer.out_channels):
            for i in range(layer.in_channels):
                ours = digits(o // (layer.out_channels // common), layer.factors)
                theirs = digits(i // (layer.in_channels // common), layer.factors)
                if any(a != b and gate < 0 for a, b, gate in zip(ours, theirs, layer.gates, strict=True)):
                    kernel[o, i] = 0
        images = [F.conv2d(image[None], kernel, layer.bias, layer.stride, layer.padding, layer.dilation) for image in x]
        return torch.cat(images)

    def test_equals_the_reference(self) -> None:
        assert_equals_reference("dgconv_c8", DGConv2d(8, 8, 3, padding=1), NAMES, unused={"D", "I"})

    @pytest.mark.parametrize("gates", range(8))
    @pytest.mark.parametrize("shape", [(8, 8), (24, 16)])
    def test_equals_the_equation_for_all_gates(self, shape: tuple[int, int], gates: int) -> None:
        layer, x = self.noisy(in_channels=shape[0], out_channels=shape[1]), torch.randn(2, shape[0], 7, 6).double()
        with torch.no_grad():
            layer.gates.copy_(torch.tensor([1 if gates >> k & 1 else -1 for k in range(3)]))
        assert_close(layer(x), self.slowly(layer, x))

    @pytest.mark.parametrize(
        ("in_channels", "out_channels", "factors"),
        [(8, 8, [2, 2, 2]), (12, 12, [2, 2, 3]), (12, 30, [2, 3]), (64, 256, [2] * 6), (7, 7, [7]), (45, 27, [3, 3])],
    )
    def test_factors_are_the_primes_of_the_greatest_common_divisor(
        self, in_channels: int, out_channels: int, factors: list[int]
    ) -> None:
        layer = DGConv2d(in_channels, out_channels, 1)
        assert layer.factors == factors
        assert layer.gates.shape == (len(factors),)
        assert layer.membership().shape == (out_channels, in_channels)

    def test_the_paper_s_picture(self) -> None:
        layer = DGConv2d(8, 8, 1)
        with torch.no_grad():
            layer.gates.copy_(torch.tensor([-1, -1, 1]))
        assert torch.equal(layer.membership(), torch.block_diag(*[torch.ones(2, 2)] * 4))
        with torch.no_grad():
            layer.gates.copy_(torch.tensor([-1, 1, -1]))
        strided = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
        assert torch.equal(layer.membership(), torch.block_diag(strided, strided))

    def test_all_gates_open_is_a_convolution_and_all_closed_a_grouped_one(self) -> None:
        x = torch.randn(2, 4, 7, 6).double()
        layer = fill_with_noise_(DGConv2d(4, 6, 3, gate_init="dense").double().requires_grad_(False))
        layer.gates.fill_(0)  # sign(0) = +1
        assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))
        layer.gates.fill_(-1)
        blocks = torch.cat([layer.weight[:3, :2], layer.weight[3:, 2:]])
        assert_close(layer(x), F.conv2d(x, blocks, layer.bias, groups=2))

    def test_ones_in_u_and_their_gradient(self) -> None:
        layer = DGConv2d(24, 36, 1)
        with torch.no_grad():
            layer.gates.copy_(torch.tensor([-0.3, 0.2, -0.1]))
        ones = layer.membership().sum()
        (gradient,) = torch.autograd.grad(ones, layer.gates)
        # The paper's C prod_k (1 + g_k), for factors p: prod_k p (1 + g_k (p - 1)), times the channels that remain.
        g = (layer.gates.detach() >= 0).float().requires_grad_()
        expected = math.prod(p * (1 + g[k] * (p - 1)) for k, p in enumerate([2, 2, 3])) * 2 * 3
        assert ones == expected
        assert_close(gradient, torch.autograd.grad(expected, g)[0])

    def test_gates_get_the_straight_through_gradient(self) -> None:
        layer, x = self.noisy(in_channels=4, out_channels=4), torch.randn(2, 4, 7, 6).double()
        before = layer.gates.clone()
        layer(x).sum().backward()
        mask = layer.membership().detach().requires_grad_()
        F.conv2d(x, mask[:, :, None, None] * layer.weight, layer.bias).sum().backward()
        one, eye = torch.ones(2, 2).double(), torch.eye(2).double()
        parts = [one if gate >= 0 else eye for gate in layer.gates]
        expected = [
            (mask.grad * torch.kron(one - eye, parts[1])).sum(),
            (mask.grad * torch.kron(parts[0], one - eye)).sum(),
        ]
        assert_close(layer.gates.grad, torch.stack(expected))
        assert torch.equal(layer.gates, before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_gates_stay_in_float32(self, dtype: torch.dtype) -> None:
        layer = DGConv2d(64, 64, 1, gate_seed=1)
        membership = layer.membership()
        assert not membership.all()
        layer(torch.randn(2, 64, 3, 3)).sum().backward()
        assert torch.equal(layer.to(dtype).membership(), membership)
        assert (layer.gates.dtype, layer.weight.dtype) == (torch.float32, dtype)
        assert (layer.gates.grad.dtype, layer.weight.grad.dtype) == (torch.float32, dtype)
        torch.set_default_dtype(dtype)
        try:
            other = DGConv2d(64, 64, 1, gate_seed=1)
        finally:
            torch.set_default_dtype(torch.float32)
        assert (other.gates.dtype, other.weight.dtype) == (torch.float32, dtype)
        assert torch.equal(other.membership(), membership)
        assert layer.double().gates.dtype == torch.float64

    def test_gate_init(self) -> None:
        def starts(**options: Any) -> list[float]:
            return DGConv2d(64, 64, 1, **options).gates.tolist()

        assert starts(gate_init="dense") == [pytest.approx(1e-8)] * 6
        assert starts(gate_init="depthwise") == [pytest.approx(-1e-8)] * 6
        assert starts(gate_seed=3) == starts(gate_seed=3)
        assert len({tuple(starts(gate_seed=seed)) for seed in range(20)}) > 10
        torch.manual_seed(0)
        first, second = starts(), starts()
        torch.manual_seed(0)
        assert (starts(), starts()) == (first, second)
        assert [abs(gate) for gate in first] == [pytest.approx(1e-8)] * 6
        with pytest.raises(
            ValueError, match=re.escape("gate_init='open' must be one of ['random', 'dense', 'depthwise']")
        ):
            starts(gate_init="open")
        with pytest.raises(ValueError, match=re.escape("gate_seed=1.5 must be a whole number")):
            starts(gate_seed=1.5)

    def test_takes_part_in_the_protocols(self) -> None:
        assert isinstance(self.make(), Grouped)
        assert isinstance(self.make(), Foldable)

    @pytest.mark.parametrize("gates", range(8))
    @pytest.mark.parametrize("shape", [(8, 8), (12, 24), (30, 60)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_folds_to_a_grouped_convolution(self, bias: bool, shape: tuple[int, int], gates: int) -> None:
        layer = DGConv2d(*shape, 3, stride=(2, 1), padding=1, dilation=(1, 2), bias=bias)
        fill_with_noise_(layer.double())
        with torch.no_grad():
            layer.gates.copy_(torch.tensor([1 if gates >> k & 1 else -1 for k in range(3)]))
        folded, x = layer.fold(), torch.randn(2, shape[0], 9, 8).double()
        assert isinstance(folded, nn.Conv2d)
        assert folded.groups == math.prod(p for k, p in enumerate(layer.factors) if layer.gates[k] < 0)
        assert folded.weight.numel() == layer.membership().sum() * 9
        assert_close(folded(x), layer(x))
        assert type(DGConv2d(8, 8, 1, gate_init="depthwise").fold()) is nn.Conv2d

    @pytest.mark.parametrize("batch", [0, 1, 8, 19])
    def test_folded_takes_any_batch(self, batch: int) -> None:
        layer = fill_with_noise_(DGConv2d(8, 16, 3, gate_init="dense").double())
        with torch.no_grad():
            layer.gates[1] = -1
        folded, x = layer.fold(), torch.randn(batch, 8, 7, 6).double().requires_grad_()
        assert type(folded).__name__ == "PermutedConv2d"
        assert_close(folded(x), layer(x))
        channels_last = x.detach().contiguous(memory_format=torch.channels_last)
        assert_close(folded(channels_last), layer(channels_last))
        assert_close(torch.autograd.grad(folded(x).sum(), x), torch.autograd.grad(layer(x).sum(), x))
        with pytest.raises(ValueError, match=re.escape("must be (B, C_in, H, W)")):
            folded(torch.randn(8, 9, 9).double())

    def test_folding_saves_what_it_says(self) -> None:
        layer = DGConv2d(64, 64, 3, padding=1, bias=False, gate_seed=0)
        ones = int(layer.membership().sum())
        assert ones < 64 * 64 / 2
        assert multiply_adds(layer.fold(), (64, 8, 8)) == ones * 9 * 64
        assert parameters(layer.fold()) == ones * 9
        assert multiply_adds(layer, (64, 8, 8)) == 64 * 64 * 9 * 64

    @pytest.mark.parametrize(("groups", "closed"), [(1, 0), (2, 1), (4, 2), (12, 3), (3, 0)])
    def test_from_a_grouped_convolution(self, groups: int, closed: int) -> None:
        conv = fill_with_noise_(nn.Conv2d(12, 24, 3, groups=groups).double())
        layer, x = DGConv2d.from_conv(conv), torch.randn(2, 12, 7, 6).double()
        assert_close(layer(x), conv(x))
        assert (layer.gates < 0).tolist() == [k < closed for k in range(3)]


class TestGroupableResNeXt:
    """The counts of G-ResNeXt-50: dense storage, the sum of C^2, the sum of C, and the gates."""

    def test_counts(self) -> None:
        with torch.device("meta"):
            model = resnext50_32x4d()
            report = convert(model, "dgconv")
        assert len(report.replaced) == 16
        layers = [model.get_submodule(name) for name in report.replaced]
        assert sum(len(layer.gates) for layer in layers) == 137
        assert parameters(model) == 68_883_377
        assert sum(layer.membership().numel() for layer in layers) == 5_029_888
