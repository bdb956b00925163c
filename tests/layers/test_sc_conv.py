import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from dyn_lightning.convert import convert
from dyn_lightning.cost import parameters
from dyn_lightning.layers import SelfCalibratedConv2d
from dyn_lightning.layers.sc_conv import SelfCalibration
from tests.contract import LayerContract
from tests.layers import slow
from tests.reference_vectors import assert_equals_reference, norm_names
from tests.tolerances import assert_close

# The source has a norm behind k4, which is the network's own here.
NAMES = {
    "k2.1.weight": "0.k2.0.weight",
    **norm_names("k2.2", "0.k2.1"),
    "k3.0.weight": "0.k3.0.weight",
    **norm_names("k3.1", "0.k3.1"),
    "k4.0.weight": "0.k4.weight",
    **norm_names("k4.1", "1"),
}


class TestSelfCalibratedConv2d(LayerContract):
    layer = SelfCalibratedConv2d
    geometry: ClassVar = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}
    options: ClassVar = {"pooling": 3}
    scale = 0.3
    keeps_output = False

    def excluded(self, **geometry: Any) -> str:
        for name in ("in_channels", "out_channels"):
            channels, groups = geometry[name], geometry["groups"]
            if geometry["in_channels"] % groups or geometry["out_channels"] % groups:
                return f"groups={groups} must divide in_channels="
            if channels == 1:
                return f"{name}=1 must be at least 2, one for each half: leave the layer static"
            if channels // 2 % groups or (channels - channels // 2) % groups:
                return (
                    f"groups={groups} must divide each half of {name}={channels}, {channels // 2} and "
                    f"{channels - channels // 2}: take groups=1, or leave the layer static"
                )
        return ""

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        plain, calibrated = layer.k1, layer.calibrated
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        same = {"padding": "same", "dilation": layer.dilation, "groups": layer.groups}
        outputs = []
        for image in x:
            a, b = image[: plain.in_channels], image[plain.in_channels :]
            window = [min(calibrated.pooling, size) for size in b.shape[1:]]
            pooled = slow.pool(b, window, partial=False)
            small = slow.norm(F.conv2d(pooled[None], calibrated.k2[0].weight, **same)[0], calibrated.k2[1])
            up = b.clone()
            for i in range(b.shape[1]):
                for j in range(b.shape[2]):
                    up[:, i, j] = small[:, i * small.shape[1] // b.shape[1], j * small.shape[2] // b.shape[2]]
            k3 = slow.norm(F.conv2d(b[None], calibrated.k3[0].weight, **same)[0], calibrated.k3[1])
            gated = k3 / (1 + torch.exp(-(b + up)))
            halves = [
                F.conv2d(half[None], kernel, None, *geometry)[0]
                for half, kernel in ((a, plain.weight), (gated, calibrated.k4.weight))
            ]
            outputs.append(slow.add_bias(torch.cat(halves), layer.bias))
        return torch.stack(outputs)

    def test_equals_the_reference(self) -> None:
        branch = SelfCalibration(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, pooling=4)
        assert_equals_reference("scconv_c8", nn.Sequential(branch, nn.BatchNorm2d(8)), NAMES)

    @pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, (2, 1))])
    def test_groups(self, stride: int, dilation: Any) -> None:
        layer = self.noisy(in_channels=8, out_channels=12, groups=2, stride=stride, dilation=dilation)
        x = torch.randn(2, 8, 7, 6).double()
        assert_close(layer(x), self.slowly(layer, x))

    def test_channels_of_the_halves(self) -> None:
        layer = self.make(in_channels=5, out_channels=6)
        assert layer.k1.weight.shape == (3, 2, 3, 3)
        assert layer.calibrated.k2[0].weight.shape == (3, 3, 3, 3)
        assert layer.calibrated.k4.weight.shape == (3, 3, 3, 3)

    def test_map_smaller_than_the_window(self) -> None:
        x = self.images(size=(2, 3))
        assert_close(self.noisy(pooling=4, padding=1)(x), self.noisy(pooling=100, padding=1)(x))

    def test_without_calibration_is_a_grouped_convolution(self) -> None:
        layer, x = self.noisy(bias=False), torch.randn(2, 4, 7, 6).double()
        branch = layer.calibrated
        with torch.no_grad():
            # k3 is the identity and the gate is open wide.
            branch.k3[0].weight.copy_(
                torch.zeros(2, 2, 3, 3).index_put_(
                    (torch.arange(2), torch.arange(2), torch.tensor(1), torch.tensor(1)), torch.tensor(1.0)
                )
            )
            for index, shift in ((0, 1e3), (1, 0.0)):
                norm = (branch.k2, branch.k3)[index][1]
                norm.weight.copy_((norm.running_var + norm.eps).sqrt())
                norm.bias.copy_(norm.running_mean + shift)
        kernels = torch.cat([layer.k1.weight, branch.k4.weight])
        assert_close(layer(x), F.conv2d(x, kernels, groups=2))

    def test_from_conv_keeps_the_kernels_within_the_halves(self) -> None:
        conv = self.static()
        layer = SelfCalibratedConv2d.from_conv(conv, pooling=2)
        assert torch.equal(layer.k1.weight, conv.weight[:4, :2])
        assert torch.equal(layer.calibrated.k4.weight, conv.weight[4:, 2:])
        assert layer.calibrated.pooling == 2

    def test_refuses_no_pooling(self) -> None:
        with pytest.raises(ValueError, match=re.escape("pooling=0 must be at least 1")):
            self.make(pooling=0)


def test_scnet_50_has_the_paper_s_parameters() -> None:
    with torch.device("meta"):
        model = resnet50()
        convert(model, "scconv")
    assert parameters(model) == 25_564_584
