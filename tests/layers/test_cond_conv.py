from typing import ClassVar

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from dyn_lightning.layers import CondConv2d
from dyn_lightning.routing import watch
from tests.contract import MixtureContract
from tests.tolerances import assert_close


class TestCondConv2d(MixtureContract):
    layer = CondConv2d
    options: ClassVar = {"num_experts": 3}
    count = "num_experts"

    def route(self, layer: nn.Module, pooled: Tensor) -> Tensor:
        fc = layer.router.fc
        return torch.stack(
            [1 / (1 + torch.exp(-(row @ pooled) - b)) for row, b in zip(fc.weight, fc.bias, strict=True)]
        )

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_equals_timm(self, stride: int, groups: int, bias: bool) -> None:
        geometry = {"stride": stride, "padding": 1, "groups": groups, "bias": bias}
        ours, x = self.noisy(**geometry), self.images()
        theirs = timm.layers.CondConv2d(**self.geometry, **geometry, num_experts=3).double()
        with torch.no_grad():
            theirs.weight.copy_(ours.weight.flatten(1))
            if bias:
                theirs.bias.copy_(ours.bias)

        x, routing = x.requires_grad_(), ours.router(x).detach().requires_grad_()
        ours.router.register_forward_hook(lambda *_: routing)
        expected = theirs(x, routing)
        assert_close(ours(x), expected)
        cotangent = torch.randn_like(expected)
        names = ["weight", "bias"] if bias else ["weight"]
        actual = torch.autograd.grad(ours(x), (x, routing, *map(ours.get_parameter, names)), cotangent)
        expected = torch.autograd.grad(expected, (x, routing, *map(theirs.get_parameter, names)), cotangent)
        assert_close(
            [gradient.reshape(other.shape) for gradient, other in zip(actual, expected, strict=True)], expected
        )

    def test_routing_weights_are_independent(self) -> None:
        layer = self.noisy()
        with watch(layer) as routing:
            layer(self.images(5))
        (weights,) = routing.values()
        assert ((weights > 0) & (weights < 1)).all()
        assert (weights.sum(1) - 1).abs().min() > 1e-3

    def test_upcycled_experts_differ_in_routing_only(self) -> None:
        layer, x = CondConv2d.from_conv(self.static(), num_experts=3), self.images()
        weights = layer.router(x)
        assert torch.equal(weights[0], weights[1])
        assert len(weights[0].unique()) == 3
        assert torch.equal(layer.weight[0], layer.weight[2])
