import math
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.layers import GhostConv2d
from tests.contract import LayerContract
from tests.layers import slow
from tests.reference_vectors import assert_equals_reference, norm_names
from tests.tolerances import assert_close

NAMES = {
    "primary_conv.0.weight": "primary.0.weight",
    **norm_names("primary_conv.1", "primary.1"),
    "cheap_operation.0.weight": "cheap.0.weight",
    **norm_names("cheap_operation.1", "cheap.1"),
}


class TestGhostConv2d(LayerContract):
    layer = GhostConv2d
    geometry: ClassVar = {"in_channels": 4, "out_channels": 10, "kernel_size": 3}
    options: ClassVar = {"ratio": 3}  # 4 intrinsic maps, 8 ghosts, two of them dropped
    scale = 0.5
    keeps_output = False

    def excluded(self, **geometry: Any) -> str:
        intrinsic = math.ceil(geometry["out_channels"] / 3)
        if intrinsic % geometry["groups"]:
            return (
                f"groups={geometry['groups']} must divide the {intrinsic} intrinsic channels, out_channels="
                f"{geometry['out_channels']} / ratio=3 rounded up: take another ratio, or groups=1"
            )
        return ""

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        outputs = []
        for image in x:
            geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
            y = F.conv2d(image[None], layer.primary[0].weight, None, *geometry)[0]
            y = slow.norm(y, layer.primary[1]).clamp(min=0)
            each = layer.ratio - 1  # ghosts of one intrinsic map, side by side
            ghosts = [
                F.conv2d(y[None, index // each, None], kernel[None], padding=1)[0, 0]
                for index, kernel in enumerate(layer.cheap[0].weight)
            ]
            ghosts = slow.norm(torch.stack(ghosts), layer.cheap[1]).clamp(min=0)
            outputs.append(slow.add_bias(torch.cat([y, ghosts])[: layer.out_channels], layer.bias))
        return torch.stack(outputs)

    def test_equals_the_reference(self) -> None:
        assert_equals_reference("ghost_8_12", GhostConv2d(8, 12, 1, bias=False), NAMES)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_grouped_primary(self, stride: int) -> None:
        layer, x = self.noisy(out_channels=12, groups=2, stride=stride, padding=1), self.images()
        assert layer.primary[0].weight.shape == (4, 2, 3, 3)
        assert_close(layer(x), self.slowly(layer, x))

    def test_without_relu(self) -> None:
        layer, x = self.noisy(relu=False, bias=False, ratio=2), self.images()
        intrinsic = layer.primary[1](F.conv2d(x, layer.primary[0].weight))
        ghosts = layer.cheap[1](F.conv2d(intrinsic, layer.cheap[0].weight, padding=1, groups=5))
        assert_close(layer(x), torch.cat([intrinsic, ghosts], 1))
        assert layer(x).min() < 0
        assert self.noisy(bias=False)(x).min() == 0

    def test_costs_about_a_ratio_th(self) -> None:
        conv, layer = nn.Conv2d(64, 64, 3, bias=False), GhostConv2d(64, 64, 3, bias=False, ratio=4)
        kernels = sum(p.numel() for p in layer.parameters() if p.dim() == 4)
        assert kernels == conv.weight.numel() // 4 + 48 * 9

    def test_from_conv_keeps_the_first_kernels(self) -> None:
        conv = self.static(out_channels=12, groups=2)
        layer = GhostConv2d.from_conv(conv, ratio=3, cheap_kernel_size=5, relu=False)
        assert torch.equal(layer.primary[0].weight, conv.weight[[0, 1, 6, 7]])
        assert layer.cheap[0].kernel_size == (5, 5)
        assert isinstance(layer.primary[2], nn.Identity)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ratio": 1}, "ratio=1 must be at least 2"),
            ({"out_channels": 1}, "out_channels=1 must be at least 2, or there are no ghosts: use nn.Conv2d"),
            ({"ratio": 2.5}, "ratio=2.5 must be a whole number"),
            ({"cheap_kernel_size": 4}, "cheap_kernel_size=4 must be odd, or the maps would change their size"),
            ({"cheap_kernel_size": 0}, "cheap_kernel_size=0 must be at least 1"),
            ({"stride": 2, "padding": "same"}, "padding='same' needs stride=1, not stride=(2, 2)"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.make(**options)
