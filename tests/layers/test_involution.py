import re
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torchvision.models import resnet50

from dyn_lightning.convert import convert
from dyn_lightning.cost import parameters
from dyn_lightning.layers import Involution2d
from dyn_lightning.layers.involution import involve
from tests.contract import LayerContract
from tests.layers import slow
from tests.reference_vectors import assert_equals_reference, norm_names
from tests.tolerances import assert_close

NAMES = {
    "conv1.conv.weight": "reduce.weight",
    **norm_names("conv1.bn", "norm"),
    "conv2.conv.weight": "span.weight",
    "conv2.conv.bias": "span.bias",
}


class TestInvolution2d(LayerContract):
    layer = Involution2d
    geometry: ClassVar = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    options: ClassVar = {"reduction": 2, "group_channels": 2}
    scale = 0.5
    keeps_output = False

    def excluded(self, **geometry: Any) -> str:
        if geometry["in_channels"] != geometry["out_channels"]:
            return (
                f"in_channels={geometry['in_channels']} must be out_channels={geometry['out_channels']}, since "
                "involution cannot change them: put a 1x1 convolution before it, or leave the layer static"
            )
        if geometry["groups"] != 1:
            return f"groups={geometry['groups']} must be 1: say how channels share kernels by group_channels"
        return ""

    def excluded_conv(self, **geometry: Any) -> str:
        return self.excluded(**geometry | {"groups": 1})

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        (rows, columns), (down, right) = layer.kernel_size, layer.dilation
        outputs = []
        for image in x:
            middles = slow.middles(image, layer)
            pixels = slow.pool(middles, layer.stride, partial=True)
            hidden = torch.einsum("hc,cyx->hyx", layer.reduce.weight[:, :, 0, 0], pixels)
            hidden = slow.norm(hidden, layer.norm).clamp(min=0)
            kernels = torch.einsum("kh,hyx->kyx", layer.span.weight[:, :, 0, 0], hidden)
            kernels = slow.add_bias(kernels, layer.span.bias)
            around = {"same": (down * (rows // 2), right * (columns // 2)), "valid": (0, 0)}.get(
                layer.padding, layer.padding
            )
            padded = F.pad(image, (around[1], around[1], around[0], around[0]))
            y = image.new_zeros(layer.out_channels, *kernels.shape[1:])
            for channel, i, j in product(range(len(y)), range(y.shape[1]), range(y.shape[2])):
                first = channel // layer.group_channels * rows * columns
                for u, v in product(range(rows), range(columns)):
                    pixel = padded[channel, i * layer.stride[0] + u * down, j * layer.stride[1] + v * right]
                    y[channel, i, j] += kernels[first + u * columns + v, i, j] * pixel
            outputs.append(slow.add_bias(y, layer.bias))
        return torch.stack(outputs)

    def test_equals_the_reference(self) -> None:
        assert_equals_reference("involution_c16_k3", Involution2d(16, 16, 3, padding=1, bias=False), NAMES)

    def test_equals_the_unfolded_form(self) -> None:
        layer, x = self.noisy(kernel_size=7, padding=3, stride=2, bias=False), self.images(size=(14, 10))
        kernels = layer.span(torch.relu(layer.norm(layer.reduce(F.avg_pool2d(x, 2)))))
        patches = F.unfold(x, 7, padding=3, stride=2).reshape(2, 2, 2, 49, 7, 5)
        assert_close(layer(x), (kernels.reshape(2, 2, 1, 49, 7, 5) * patches).sum(3).flatten(1, 2))

    @pytest.mark.parametrize("kernel_size", [1, 3, 7, (1, 3)])
    def test_constant_kernels_are_a_depthwise_convolution(self, kernel_size: Any) -> None:
        layer, x = self.noisy(kernel_size=kernel_size, stride=(2, 1), padding=1), self.images(size=(8, 9))
        with torch.no_grad():
            layer.span.weight.zero_()
        kernels = layer.span.bias.reshape(2, 1, *layer.kernel_size).repeat_interleave(2, 0)
        assert_close(layer(x), F.conv2d(x, kernels, layer.bias, (2, 1), padding=1, groups=4))

    def test_memory_is_that_of_a_few_maps(self) -> None:
        layer = Involution2d(64, 64, 7, padding=3, bias=False)
        x = torch.randn(2, 64, 28, 28, requires_grad=True)
        tracker = MemTracker()
        with tracker:
            layer(x).sum().backward()
        (sizes,) = tracker.get_tracker_snapshot("peak").values()
        # Each of kernels and their gradient is 49 / 16 maps; an unfolded map alone is 49, kept until the backward pass.
        assert sizes["Total"] < 14 * x.numel() * x.element_size()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_in_float32(self, dtype: torch.dtype) -> None:
        """49 sums in 16 bits would lose three times as much as the rounding of the result."""
        x, kernels = torch.randn(2, 4, 14, 10).to(dtype), torch.randn(2, 2 * 49, 14, 10).to(dtype)
        arguments = ((7, 7), (1, 1), (3, 3), (1, 1))
        expected = involve(x.double(), kernels.double(), *arguments)
        assert torch.equal(involve(x, kernels, *arguments), expected.to(dtype))

    @pytest.mark.parametrize("training", [True, False])
    def test_gradient_of_the_gradient(self, training: bool) -> None:
        layer, x = self.noisy().train(training), self.images(size=(4, 3)).requires_grad_()
        assert torch.autograd.gradgradcheck(layer, (x,))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kernel_size": 4}, "kernel_size=(4, 4) must be odd, to have a pixel in the middle: take one more"),
            ({"kernel_size": (3, 2)}, "kernel_size=(3, 2) must be odd"),
            ({"group_channels": 3}, "group_channels=3 must divide in_channels=4: take fewer (or 1)"),
            ({"group_channels": 16}, "group_channels=16 must divide in_channels=4"),
            ({"group_channels": 0}, "group_channels=0 must be at least 1"),
            ({"reduction": 5}, "reduction=5 must be at most in_channels=4: take a smaller one"),
            ({"reduction": 0}, "reduction=0 must be at least 1"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.make(**options)


def test_rednet_50_has_the_paper_s_parameters() -> None:
    with torch.device("meta"):
        model = resnet50()
        convert(model, "involution")
        stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, bias=False),
            nn.BatchNorm2d(32),
            Involution2d(32, 32, 3, bias=False),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
        )
    assert parameters(model) - parameters(model.conv1) - parameters(model.bn1) + parameters(stem) == 15_540_806
