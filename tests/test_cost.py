import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning import functional
from dyn_lightning.convert import convert
from dyn_lightning.cost import methods, multiply_adds, parameters, peak_memory
from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import CondConv2d, DynamicConv2d, Involution2d
from dyn_lightning.per_sample import fastest

CONV = 6 * (5 * 4) * 4 * 9  # 4 -> 6 channels, 3 x 3 on a 7 x 6 image


def test_parameters_counts_shared_ones_once() -> None:
    linear = nn.Linear(4, 3)
    assert parameters(nn.Sequential(linear, nn.Linear(3, 4), linear)) == (4 + 1) * 3 + (3 + 1) * 4


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 6, 3), CONV),
        (nn.Conv2d(4, 6, 3, groups=2), CONV // 2),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), 6 * (4 * 3) * 4 * 9),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(120, 10)), CONV + 120 * 10),
        # the convolution, mixing 3 kernels and biases, the attention: 4 -> 2 -> 3
        (
            DynamicConv2d(4, 6, 3, num_kernels=3, reduction=2),
            CONV + 3 * (6 * 4 * 9 + 6) + 4 * 2 + 2 * 3,
        ),
        (CondConv2d(4, 6, 3, bias=False, num_experts=5), CONV + 5 * 6 * 4 * 9 + 4 * 5),
        # 4 -> 2 -> 2 groups of 9 elements, and 9 products a channel, for each of 4 x 3 pixels
        (
            Involution2d(4, 4, 3, stride=2, padding=1, reduction=2, group_channels=2),
            4 * 3 * (4 * 2 + 2 * 2 * 9 + 9 * 4),
        ),
        (DynamicConv2d(4, 6, 1, bias=False, num_kernels=3, reduction=2), 6 * 42 * 4 + 3 * 6 * 4 + 4 * 2 + 2 * 3),
    ],
)
def test_multiply_adds_by_hand(layer: nn.Module, expected: int) -> None:
    assert multiply_adds(layer, (4, 7, 6)) == expected
    assert multiply_adds(layer.double(), (4, 7, 6)) == expected


def test_multiply_adds_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Sequential(nn.Dropout()), nn.ReLU())
    model[2].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    multiply_adds(model, (4, 7, 6))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_multiply_adds_restores_the_mode_on_an_exception() -> None:
    model = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError):
        multiply_adds(model, (5, 7, 6))
    assert model.training


def test_peak_memory_is_in_bytes() -> None:
    block = torch.ones(2**24)
    peak = peak_memory()
    assert block.nbytes < peak["host"] < 2**43
    assert ("device" in peak) == torch.cuda.is_available()


@pytest.mark.parametrize("method", ["grouped", "matmul", "mixture", "chunked", "benchmark"])
def test_the_method_does_not_change_the_multiply_adds(method: str) -> None:
    before = dict(fastest.MEASURED)
    layer = CondConv2d(4, 6, 3, num_experts=5, bias=False, method=method)
    assert multiply_adds(layer, (4, 7, 6)) == 6 * 4 * 9 * (5 * 4 + 5) + 4 * 5
    assert before == fastest.MEASURED


class TestMethods:
    def test_names_the_methods_of_a_network(self) -> None:
        model = torchvision.models.mobilenet_v2()
        convert(model, "dynamic")
        found = methods(model, (3, 224, 224))
        assert len(found) == 51
        assert found["features.1.conv.0.0"] == "grouped"  # depthwise, 112 x 112
        assert found["features.17.conv.2"] == "cpp"  # of 38 MB of mixed kernels
        of_one = methods(model, (3, 224, 224), batch_size=1, training=False)
        assert set(of_one.values()) == {"grouped", "cpp"}
        small = methods(model, (3, 32, 32), batch_size=1, training=False)
        assert small["features.1.conv.0.0"] == "grouped"  # depthwise, 16 x 16
        of_the_last = {name: method for name, method in small.items() if name.startswith("features.17.")}
        assert [*of_the_last.values()] == ["cpp", "grouped", "cpp"]
        assert model.training
        assert all(buffer.isfinite().all() for buffer in model.buffers())

    def test_a_layer_s_own_wish_and_one_that_runs_twice(self) -> None:
        layer = CondConv2d(4, 4, 1, method="mixture")
        assert methods(nn.Sequential(layer, nn.ReLU(), layer), (4, 7, 6)) == {"0": "mixture, mixture"}

    def test_a_compiled_model(self) -> None:
        layer = CondConv2d(4, 4, 1)
        compiled = torch.compile(nn.Sequential(layer), backend="eager")
        assert set(methods(compiled, (4, 7, 6)).values()) == {"matmul"}

    def test_times_nothing(self) -> None:
        before = dict(fastest.MEASURED)
        assert methods(CondConv2d(24, 144, 1, method="benchmark"), (24, 56, 56)) == {"": "cpp"}
        assert before == fastest.MEASURED

    def test_leaves_no_hook_when_the_model_fails(self) -> None:
        layer = CondConv2d(4, 6, 3)
        with pytest.raises(ValueError, match="must not be smaller than the kernel"):
            methods(layer, (4, 2, 2))
        assert not layer._forward_hooks
        assert functional.NOTE.get() is None


def test_operations_of_chunks_are_counted() -> None:
    x, routing = torch.randn(3, 4, 7, 6, requires_grad=True), torch.rand(3, 2)
    weight = torch.randn(2, 6, 4, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = dynamic_conv2d(x, routing, weight, method="chunked")
    mixing, products = 3 * 2 * 6 * 4 * 9, 3 * (6 * 5 * 4) * 4 * 9
    assert counter.get_total_flops() == 2 * (mixing + products)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * mixing + 2 * products)  # routing needs no gradient
