import math
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18

from dyn_lightning.convert import convert
from dyn_lightning.cost import parameters
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.routing import watch
from tests.contract import MixtureContract
from tests.noise import fill_with_noise_
from tests.reference_vectors import assert_equals_reference
from tests.tolerances import assert_close

# Name in the source -> name here.
NAMES = {
    "weight": "weight",
    "bias": "bias",
    "attention.fc1.weight": "router.fc1.weight",
    "attention.fc2.weight": "router.fc2.weight",
    "attention.fc2.bias": "router.fc2.bias",
}


class TestDynamicConv2d(MixtureContract):
    layer = DynamicConv2d
    options: ClassVar = {"num_kernels": 3, "reduction": 2, "temperature": 1.7}
    count = "num_kernels"

    def route(self, layer: nn.Module, pooled: Tensor) -> Tensor:
        router = layer.router
        hidden = (router.fc1.weight @ pooled).clamp(min=0)
        odds = torch.exp((router.fc2.weight @ hidden + router.fc2.bias) / router.temperature)
        return odds / odds.sum()

    def test_equals_the_reference(self) -> None:
        layer = DynamicConv2d(6, 8, 3, padding=1, num_kernels=4, reduction=3, temperature=31)
        assert_equals_reference("dynamic_conv_k3", layer, NAMES, own={"router.temperature"})

    def test_attention_sums_to_one(self) -> None:
        layer = self.noisy()
        with watch(layer) as routing:
            layer(self.images(5))
        (weights,) = routing.values()
        assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
        assert weights.std() > 0.01

    def test_high_temperature_gives_the_mean_kernel(self) -> None:
        layer, x = self.noisy(temperature=1e12), self.images()
        assert_close(layer(x), nn.functional.conv2d(x, layer.weight.mean(0), layer.bias.mean(0)))

    def test_upcycled_layer_keeps_the_output_under_any_attention(self) -> None:
        conv, x = self.static(), self.images()
        layer = DynamicConv2d.from_conv(conv, num_kernels=3, reduction=1, temperature=0.1)
        fill_with_noise_(layer.router)
        assert layer.router(x).std() > 0.01
        assert_close(layer(x), conv(x))

    def test_from_conv_passes_its_options_on(self) -> None:
        layer = DynamicConv2d.from_conv(self.static(), num_kernels=5, reduction=2, temperature=7)
        assert len(layer.weight) == 5
        assert layer.router.fc1.weight.shape == (2, 4)
        assert layer.router.temperature == 7

    def test_hidden_layer_has_at_least_one_unit(self) -> None:
        assert DynamicConv2d(1, 6, 3, reduction=4).router.fc1.weight.shape == (1, 1)

    def test_temperature_travels_with_the_state(self) -> None:
        layer, other, x = self.noisy(temperature=31), self.noisy(temperature=31), self.images()
        layer.set_temperature(1)
        assert not torch.equal(layer(x), other(x))
        other.load_state_dict(layer.state_dict())
        assert other.router.temperature == 1
        assert torch.equal(layer(x), other(x))

    def test_temperature_is_a_float32_buffer(self) -> None:
        layer = self.make()
        assert layer.state_dict()["router.temperature"].dtype == torch.float32
        assert "router.temperature" not in dict(layer.named_parameters())
        assert "temperature=1.7" in repr(layer)

    def test_temperature_is_exact_in_a_bfloat16_module(self) -> None:
        layer = self.make(temperature=29.9).bfloat16()
        assert layer.router.temperature.item() == pytest.approx(29.9, abs=1e-5)
        layer.set_temperature(28.7)
        assert layer.router.temperature.item() == pytest.approx(28.7, abs=1e-5)

    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
    def test_temperature_must_be_above_zero(self, value: float) -> None:
        message = rf"temperature={value} must be a finite number above 0 \(1 is the plain softmax\)"
        with pytest.raises(ValueError, match=message):
            self.make(temperature=value)
        layer = self.make()
        with pytest.raises(ValueError, match=message):
            layer.set_temperature(value)
        assert layer.router.temperature == torch.tensor(1.7)

    def test_reduction_must_be_at_least_one(self) -> None:
        with pytest.raises(ValueError, match=r"reduction=0\.5 must be at least 1"):
            self.make(reduction=0.5)


@pytest.fixture
def _meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("_meta")
class TestParameterCounts:
    """The counts of the paper's port; ours has a bias in the attention's second layer, 4 numbers a layer."""

    def test_resnet18(self) -> None:
        model = resnet18()
        convert(model, "dynamic", include=lambda name, conv: name != "conv1")
        assert parameters(model) == 45_471_016 + 4 * 19

    # The source gives two decimals, the last of them cut, not rounded.
    @pytest.mark.parametrize(("exclude", "millions"), [(None, 12.40), ("features.18.0", 11.14)])
    def test_mobilenet_v2(self, exclude: str | None, millions: float) -> None:
        model = mobilenet_v2()
        convert(model, "dynamic", exclude=exclude)
        assert 0 <= parameters(model) / 1e6 - millions < 0.01
