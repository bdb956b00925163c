import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SplitAttn
from torch import Tensor, nn

from dyn_lightning.layers import SplitAttentionConv2d
from tests.contract import LayerContract
from tests.layers import slow
from tests.noise import fill_with_noise_, randomize_norms_
from tests.reference_vectors import assert_equals_reference, norm_names
from tests.tolerances import assert_close

NAMES = {
    "conv.weight": "conv.weight",
    **norm_names("bn0", "norm"),
    "fc1.weight": "fc1.weight",
    "fc1.bias": "fc1.bias",
    **norm_names("bn1", "norm1"),
    "fc2.weight": "fc2.weight",
    "fc2.bias": "fc2.bias",
}


def from_timm(theirs: SplitAttn) -> SplitAttentionConv2d:
    """Build our layer with the weights of timm's."""
    conv = theirs.conv
    ours = SplitAttentionConv2d(
        conv.in_channels,
        theirs.fc1.in_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        theirs.fc1.groups,
        bias=False,
        radix=theirs.radix,
    )
    ours.load_state_dict({NAMES[name]: value for name, value in theirs.state_dict().items()})
    return ours.to(conv.weight).train(theirs.training)


class TestSplitAttentionConv2d(LayerContract):
    layer = SplitAttentionConv2d
    scale = 0.3
    keeps_output = False

    def excluded(self, **geometry: Any) -> str:
        radix, groups = geometry.get("radix", 2), geometry["groups"]
        if geometry["in_channels"] % (groups * radix):
            return (
                f"groups * radix = {groups} * {radix} must divide in_channels={geometry['in_channels']}: take another "
                "radix (1 is attention over the channels alone), or leave the layer static"
            )
        return ""

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        radix, cardinality, channels = layer.radix, layer.groups, layer.out_channels
        outputs = []
        for image in x:
            geometry = (layer.stride, layer.padding, layer.dilation, cardinality * radix)
            maps = slow.norm(F.conv2d(image[None], layer.conv.weight, None, *geometry)[0], layer.norm).clamp(min=0)
            splits = [maps[r * channels : (r + 1) * channels] for r in range(radix)]
            pooled = torch.stack([sum(split[c].mean() for split in splits) for c in range(channels)])
            hidden, logits = [], []
            for k in range(cardinality):
                part = pooled.chunk(cardinality)[k]
                hidden.append(layer.fc1.weight.chunk(cardinality)[k][:, :, 0, 0] @ part)
            hidden = torch.cat(hidden) + layer.fc1.bias
            hidden = slow.norm(hidden[:, None, None], layer.norm1)[:, 0, 0].clamp(min=0)
            for k in range(cardinality):
                logits.append(layer.fc2.weight.chunk(cardinality)[k][:, :, 0, 0] @ hidden.chunk(cardinality)[k])
            logits = torch.cat(logits) + layer.fc2.bias
            width = channels // cardinality
            y = torch.zeros_like(splits[0])
            for c in range(channels):
                k, rest = divmod(c, width)
                own = torch.stack([logits[k * radix * width + r * width + rest] for r in range(radix)])
                odds = own.exp()
                weights = odds / odds.sum() if radix > 1 else odds / (1 + odds)
                y[c] = sum(weights[r] * splits[r][c] for r in range(radix))
            outputs.append(slow.add_bias(y, layer.bias))
        return torch.stack(outputs)

    def test_equals_the_reference(self) -> None:
        layer = SplitAttentionConv2d(8, 12, 3, padding=1, bias=False)
        assert_equals_reference("splat_r2_k1", layer, NAMES)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize(("radix", "groups"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 3), (2, 5)])
    def test_equals_the_equation_for_any_radix(self, radix: int, groups: int, stride: int) -> None:
        geometry = {"in_channels": 4 * radix * groups, "out_channels": 2 * groups, "stride": stride, "padding": 1}
        layer = self.noisy(**geometry, groups=groups, radix=radix)
        x = torch.randn(2, layer.in_channels, 7, 6).double()
        assert layer.fc1.out_channels % groups == 0
        assert_close(layer(x), self.slowly(layer, x))

    @pytest.mark.parametrize(("radix", "groups"), [(1, 2), (2, 1), (2, 2), (4, 2)])
    @pytest.mark.parametrize("training", [True, False])
    def test_equals_timm(self, training: bool, radix: int, groups: int) -> None:
        theirs = SplitAttn(64, 32, 3, stride=2, groups=groups, radix=radix, norm_layer=nn.BatchNorm2d)
        theirs = fill_with_noise_(theirs.double(), scale=0.2).train(training)
        ours, x = from_timm(theirs), torch.randn(3, 64, 9, 8).double()
        assert_close(ours(x), theirs(x))
        assert_close(ours.state_dict()["norm1.running_var"], theirs.state_dict()["bn1.running_var"])

    def test_a_resnest_of_timm_keeps_its_logits(self) -> None:
        model, x = timm.create_model("resnest14d", pretrained=False).double().eval(), torch.randn(2, 3, 64, 48).double()
        randomize_norms_(model)
        with torch.no_grad():
            logits = model(x)
            names = [name for name, module in model.named_modules() if isinstance(module, SplitAttn)]
            for name in names:
                model.set_submodule(name, from_timm(model.get_submodule(name)))
            assert len(names) == 4
            assert sum(parameter.numel() for parameter in model.parameters()) == 10_611_688
            assert_close(model(x), logits)

    def test_the_weights_of_the_splits_sum_to_one(self) -> None:
        layer = self.noisy(radix=2, groups=2)
        weights = layer.attention(torch.randn(3, 6, 1, 1).double())
        assert weights.shape == (3, 2, 6)
        assert_close(weights.sum(1), torch.ones(3, 6).double())

    def test_hidden_units(self) -> None:
        assert SplitAttentionConv2d(64, 64, 1).fc1.out_channels == 32
        assert SplitAttentionConv2d(128, 64, 1, radix=4, reduction=2).fc1.out_channels == 256
        assert SplitAttentionConv2d(30, 30, 1, groups=3).fc1.out_channels == 33

    def test_from_conv_keeps_the_kernels_of_each_part(self) -> None:
        conv = self.static()
        layer = SplitAttentionConv2d.from_conv(conv, radix=4, reduction=8)
        assert layer.conv.weight.shape == (24, 1, 3, 3)
        assert torch.equal(layer.conv.weight, torch.cat([conv.weight[:, [c]] for c in range(4)]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"radix": 0}, "radix=0 must be at least 1"),
            ({"radix": 3}, "groups * radix = 1 * 3 must divide in_channels=4: take another radix"),
            ({"reduction": 0}, "reduction=0 must be at least 1"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.make(**options)
