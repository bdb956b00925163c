import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.cost import parameters
from dyn_lightning.layers import DOConv2d
from dyn_lightning.protocols import Foldable
from tests.contract import LayerContract
from tests.noise import fill_with_noise_
from tests.reference_vectors import assert_equals_reference
from tests.tolerances import assert_close


class TestDOConv2d(LayerContract):
    layer = DOConv2d
    scale = 0.3
    takes_one_image = True

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The definition: a depthwise convolution with D, then a convolution of its D_mul maps a channel with W."""
        area, elements = math.prod(layer.kernel_size), layer.W.shape[2]
        repeats = elements // area
        kernels = []
        for o, weight in enumerate(layer.W):
            group = o // (layer.out_channels // layer.groups)
            for i, w in enumerate(weight):
                channel = group * weight.shape[0] + i
                for m in range(area):
                    value = sum(w[m + r * area] for r in range(repeats)) if layer.D is not None else w[m]
                    if layer.D is not None:
                        value = value + (layer.D[channel, m] * w).sum()
                    kernels.append(value)
        kernel = torch.stack(kernels).reshape(len(layer.W), -1, *layer.kernel_size)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.cat([F.conv2d(image[None], kernel, layer.bias, *geometry) for image in x])

    def test_equals_the_reference(self) -> None:
        names = {"W": "W", "D": "D", "bias": "bias"}
        assert_equals_reference("doconv_6_8", DOConv2d(6, 8, 3, padding=1), names, unused={"d_diag"})

    @pytest.mark.parametrize("depth_multiplier", [9, 10, 18, 31])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_depth_multiplier(self, groups: int, depth_multiplier: int) -> None:
        layer, x = self.noisy(groups=groups, depth_multiplier=depth_multiplier), self.images()
        assert layer.W.shape == (6, 4 // groups, depth_multiplier)
        assert_close(layer(x), self.slowly(layer, x))
        conv = self.static(groups=groups)
        assert_close(DOConv2d.from_conv(conv, depth_multiplier=depth_multiplier)(x), conv(x))

    @pytest.mark.parametrize(("in_channels", "out_channels", "groups"), [(4, 6, 1), (4, 6, 2), (8, 12, 4), (4, 8, 4)])
    def test_is_a_depthwise_convolution_before_a_grouped_one(
        self, in_channels: int, out_channels: int, groups: int
    ) -> None:
        layer = self.noisy(in_channels=in_channels, out_channels=out_channels, groups=groups, padding=1, bias=False)
        x = torch.randn(2, in_channels, 7, 6).double()
        D = layer.D + torch.eye(9)
        depthwise = D.transpose(1, 2).reshape(in_channels * 9, 1, 3, 3)
        maps = F.conv2d(x, depthwise, padding=1, groups=in_channels)
        assert_close(layer(x), F.conv2d(maps, layer.W.reshape(out_channels, -1, 1, 1), groups=groups))

    def test_starts_as_a_convolution(self) -> None:
        layer, x = DOConv2d(4, 6, 3).double(), self.images()
        assert_close(layer(x), F.conv2d(x, layer.W.reshape(6, 4, 3, 3), layer.bias))
        expected = nn.Conv2d(64, 64, 3)
        layer = DOConv2d(64, 64, 3)
        assert layer.W.std().item() == pytest.approx(expected.weight.std().item(), rel=0.1)
        assert layer.bias.abs().max().item() == pytest.approx(expected.bias.abs().max().item(), rel=0.2)

    def test_runs_without_data(self) -> None:
        with torch.device("meta"):
            layer = DOConv2d(4, 6, 3, depth_multiplier=20)
            assert layer(torch.empty(2, 4, 7, 6)).shape == (2, 6, 5, 4)
        other, x = DOConv2d(4, 6, 3, depth_multiplier=20), torch.randn(2, 4, 7, 6)
        layer.to_empty(device="cpu").load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))

    def test_counts_its_parameters_only(self) -> None:
        # The source keeps the identity as a frozen parameter: 7,232 for this layer.
        assert parameters(DOConv2d(16, 32, 3)) == 32 * 16 * 9 + 16 * 9 * 9 + 32
        assert set(DOConv2d(16, 32, 3).state_dict()) == {"W", "D", "bias"}

    def test_a_pointwise_kernel_has_no_d(self) -> None:
        layer = DOConv2d(4, 6, 1, depth_multiplier=5)
        assert layer.D is None
        assert parameters(layer) == parameters(nn.Conv2d(4, 6, 1))

    @pytest.mark.parametrize(
        "geometry",
        [{}, {"kernel_size": 1}, {"groups": 2, "bias": False}, {"stride": 2, "padding": (2, 1), "dilation": 2}],
        ids=str,
    )
    def test_folds_to_a_convolution(self, geometry: dict[str, Any]) -> None:
        layer, x = self.noisy(**geometry), self.images()
        folded, plain = layer.fold(), nn.Conv2d(**{**self.geometry, **geometry})
        assert type(folded) is nn.Conv2d
        assert repr(folded) == repr(plain)
        assert_close(folded(x), layer(x))
        plain.load_state_dict(folded.state_dict(), strict=True)
        before = layer(x)
        fill_with_noise_(folded, seed=1)
        assert torch.equal(layer(x), before)
        assert isinstance(layer, Foldable)

    @pytest.mark.parametrize(
        ("depth_multiplier", "message"),
        [
            (0, "depth_multiplier=0 must be at least 1"),
            ("a", "depth_multiplier='a' must be a whole number"),
            (
                8,
                "depth_multiplier=8 must be at least the kernel's area, 9 for kernel_size=(3, 3): leave it out to have",
            ),
        ],
    )
    def test_refuses_fewer_elements_than_the_area(self, depth_multiplier: int, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.make(depth_multiplier=depth_multiplier)
        with pytest.raises(ValueError, match=re.escape(message)):
            DOConv2d.from_conv(self.static(), depth_multiplier=depth_multiplier)
