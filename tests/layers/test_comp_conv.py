import math
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.cost import multiply_adds
from dyn_lightning.layers import CompConv2d, GhostConv2d
from tests.contract import LayerContract
from tests.layers import slow
from tests.tolerances import assert_close


class TestCompConv2d(LayerContract):
    layer = CompConv2d
    geometry: ClassVar = {"in_channels": 4, "out_channels": 10, "kernel_size": 3}
    options: ClassVar = {"depth": 2}  # 2 channels first, then 2 + 2 and 4 + 4, 2 of which are dropped
    scale = 0.5
    keeps_output = False

    def excluded(self, **geometry: Any) -> str:
        primary = math.ceil(geometry["out_channels"] / 6)
        if primary > geometry["in_channels"]:
            return (
                f"depth=2 copies {primary} channels for out_channels={geometry['out_channels']}, but in_channels="
                f"{geometry['in_channels']} has not so many: take a smaller depth, 1 copies none"
            )
        if 4 * primary >= geometry["out_channels"]:
            return (
                f"depth=2 makes {4 * primary} channels without the tail, which leaves nothing for it in out_channels="
                f"{geometry['out_channels']}: take a smaller depth, or leave the layer static"
            )
        if primary % geometry["groups"]:
            return (
                f"groups={geometry['groups']} must divide the {primary} channels of the first convolution, "
                f"ceil(out_channels / 6) of out_channels={geometry['out_channels']}: take another depth, or groups=1"
            )
        return ""

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        outputs = []
        for image in x:
            middles = slow.middles(image, layer)
            pixels = {
                "pool": slow.pool(middles, layer.stride, partial=True),
                "slice": middles[:, :: layer.stride[0], :: layer.stride[1]],
            }[layer.copy]
            part, copied, parts = F.conv2d(image[None], layer.convs[0].weight, None, *geometry)[0], 0, []
            for conv in layer.convs[1:]:
                part = torch.cat([pixels[copied : copied + len(part)], part])
                parts.append(part)
                copied += len(part) // 2
                part = F.conv2d(part[None], conv.weight, None, 1, "same", layer.dilation, layer.groups)[0]
            source, last = (parts[-1] if parts else part), part
            groups = len(last) // layer.tail.weight.shape[1]
            tail = F.conv2d(source[None], layer.tail.weight, None, 1, "same", layer.dilation, groups)[0]
            kept = layer.out_channels - sum(map(len, (*parts, last)))
            y = torch.cat([*parts, tail[:kept], last])
            width = layer.out_channels // layer.shuffle
            shuffled = [y[group * width + c] for c in range(width) for group in range(layer.shuffle)]
            outputs.append(slow.add_bias(torch.stack(shuffled), layer.bias))
        return torch.stack(outputs)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("copy", ["pool", "slice"])
    @pytest.mark.parametrize("tail", ["depthwise", "full"])
    @pytest.mark.parametrize(
        ("depth", "out_channels", "shuffle"), [(1, 7, 1), (1, 8, 4), (2, 12, 2), (3, 28, 2), (3, 25, 5), (3, 27, 6)]
    )
    def test_equals_the_equation_with_every_option(
        self, depth: int, out_channels: int, shuffle: int, tail: str, copy: str, stride: int
    ) -> None:
        options = {"depth": depth, "tail": tail, "copy": copy, "shuffle": shuffle}
        layer = self.noisy(in_channels=6, out_channels=out_channels, stride=stride, padding=1, **options)
        x = torch.randn(2, 6, 7, 6).double()
        assert_close(layer(x), self.slowly(layer, x))

    def test_grouped(self) -> None:
        layer, x = self.noisy(in_channels=6, out_channels=12, groups=2, tail="full"), torch.randn(2, 6, 7, 6).double()
        assert layer.tail.groups == 2
        assert_close(layer(x), self.slowly(layer, x))

    @pytest.mark.parametrize(
        ("in_channels", "depth"), [(3, 1), (128, 1), (255, 1), (256, 2), (511, 2), (512, 3), (4096, 3)]
    )
    def test_depth_by_the_paper_s_rule(self, in_channels: int, depth: int) -> None:
        with torch.device("meta"):
            assert CompConv2d(in_channels, 64, 1).depth == depth
            assert (
                CompConv2d(in_channels, 64, 1, base_channels=2 * 128).depth == max(1, depth - 1) or in_channels == 4096
            )

    @pytest.mark.parametrize(
        ("depth", "tail", "ratio"),
        [
            (1, "depthwise", 0.50),
            (2, "depthwise", 0.278),
            (3, "depthwise", 0.173),
            (1, "full", 0.75),
            (2, "full", 0.389),
            (3, "full", 0.255),
        ],
    )
    def test_costs_what_the_paper_s_formula_says(self, depth: int, tail: str, ratio: float) -> None:
        channels = 14 * 48
        with torch.device("meta"):
            layer = CompConv2d(channels, channels, 3, padding=1, bias=False, depth=depth, tail=tail)
            cost = multiply_adds(layer, (channels, 8, 8)) / (8 * 8)
        first = channels / (2 * (2**depth - 1))
        tails = 2 ** (depth - 1) * first
        expected = channels * first + sum((2**i * first) ** 2 for i in range(1, depth))
        expected += tails if tail == "depthwise" else tails**2
        assert cost == 9 * expected
        assert cost / (9 * channels**2) == pytest.approx(ratio, abs=0.002)

    def test_depth_one_is_a_ghost_module_without_norms(self) -> None:
        layer, x = self.noisy(out_channels=8, depth=1, shuffle=1, padding=1), self.images()
        ghost = GhostConv2d(4, 8, 3, padding=1, relu=False).double().eval()
        ghost.primary[1], ghost.cheap[1] = nn.Identity(), nn.Identity()
        ghost.load_state_dict(
            {"primary.0.weight": layer.convs[0].weight, "cheap.0.weight": layer.tail.weight, "bias": layer.bias.roll(4)}
        )
        assert_close(layer(x).roll(4, 1), ghost(x))  # the halves stand the other way round

    def test_from_conv_keeps_the_first_kernels(self) -> None:
        conv = self.static(in_channels=8, out_channels=28)
        layer = CompConv2d.from_conv(conv, depth=3, tail="full", copy="slice", shuffle=7)
        assert torch.equal(layer.convs[0].weight, conv.weight[:2])
        assert (layer.depth, layer.copy, layer.shuffle, layer.tail.groups) == (3, "slice", 7, 1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depth": 0}, "depth=0 must be at least 1"),
            (
                {"depth": 3, "out_channels": 56},
                "depth=3 copies 12 channels for out_channels=56, but in_channels=4 has not",
            ),
            ({"depth": 1, "out_channels": 1}, "depth=1 makes 1 channels without the tail, which leaves nothing for it"),
            ({"depth": 2000}, "depth=2000 copies"),
            ({"base_channels": 0}, "base_channels=0 must be at least 1"),
            ({"shuffle": 0}, "shuffle=0 must be at least 1"),
            ({"tail": "none"}, "tail='none' must be 'depthwise' or 'full'"),
            ({"copy": "none"}, "copy='none' must be one of ['pool', 'slice']"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.make(**options)
