import math

import pytest
import torch
from torch import Tensor, nn

from dyn_lightning.layers import CondConv2d, DGConv2d, DynamicConv2d
from dyn_lightning.recipe import group_complexity, over_budget, parameter_groups, warmup_cosine
from tests.training import Mixed, dynamic, static


class TestParameterGroups:
    def names(self, model: nn.Module, weight_decay: float = 0.1) -> dict[float, set[str]]:
        """Give the parameters' names by their weight decay."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, weight_decay)
        return {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}

    def test_kernels_and_matrices_alone_decay(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Flatten(), nn.Linear(8, 3)
        )
        rest = {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "5.bias"}
        assert self.names(model) == {0.1: {"0.weight", "5.weight"}, 0.0: rest}

    @pytest.mark.parametrize(
        ("layer", "router"),
        [
            (DynamicConv2d(1, 4, 3), {"router.fc1.weight", "router.fc2.weight", "router.fc2.bias"}),
            (CondConv2d(1, 4, 3), {"router.fc.weight", "router.fc.bias"}),
        ],
        ids=["dynamic", "condconv"],
    )
    def test_routers_and_mixed_biases_do_not_decay(self, layer: nn.Module, router: set[str]) -> None:
        assert layer.bias.ndim == 2
        expected = {0.1: {"0.weight"}, 0.0: {f"0.{name}" for name in router | {"bias"}}}
        assert self.names(nn.Sequential(layer)) == expected
        assert self.names(layer) == {0.1: {"weight"}, 0.0: router | {"bias"}}

    def test_a_users_router_does_not_decay(self) -> None:
        model = nn.Sequential(Mixed(nn.Linear(4, 2)), nn.Linear(4, 2))
        expected = {0.1: {"1.weight"}, 0.0: {"0.router.weight", "0.router.bias", "0.scales", "1.bias"}}
        assert self.names(model) == expected

    def test_each_trainable_parameter_is_in_one_group(self) -> None:
        model = nn.Sequential(dynamic(), static())
        model[1][0].requires_grad_(False)
        grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
        assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)

    def test_a_shared_parameter_is_in_one_group(self) -> None:
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, shared)
        assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 2

    def test_an_empty_group_is_left_out(self) -> None:
        assert self.names(nn.BatchNorm2d(4)) == {0.0: {"weight", "bias"}}
        assert self.names(nn.Conv2d(1, 4, 3, bias=False)) == {0.1: {"weight"}}

    def test_gates_do_not_decay(self) -> None:
        layer = DGConv2d(8, 8, 1)
        decayed, rest = parameter_groups(layer, 0.1)
        assert [id(one) for one in decayed["params"]] == [id(layer.weight)]
        assert id(layer.gates) in [id(one) for one in rest["params"]]


class TestWarmupCosine:
    def test_by_hand(self) -> None:
        half = math.sqrt(0.5)
        cosine = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
        assert [warmup_cosine(step, 0, 4) for step in range(5)] == pytest.approx(cosine)
        assert [warmup_cosine(step, 3, 7) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, *cosine])

    @pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 1), (3, 3), (5, 3), (2.5, 7)])
    def test_stays_in_range(self, warmup: float, total: int) -> None:
        values = [warmup_cosine(step, warmup, total) for step in range(12)]
        assert all(0 <= value <= 1 for value in values)
        assert values[0] > 0


class Fixed(nn.Module):
    """A user's own layer that groups: it connects each channel with itself and the first one."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def membership(self) -> Tensor:
        return torch.eye(4).index_fill(1, torch.tensor(0), 1)


class TestGroupComplexity:
    def test_complexity_is_counted_over_all_layers(self) -> None:
        model = nn.Sequential(DGConv2d(8, 4, 1, gate_init="dense"), DGConv2d(4, 4, 1, gate_init="depthwise"), Fixed())
        assert group_complexity(model, 2).item() == (32 + 4 + 7) / ((32 + 16 + 16) / 2)

    def test_the_gradient_of_the_factor_by_hand(self) -> None:
        layer = DGConv2d(8, 8, 1, gate_init="dense")
        over_budget(group_complexity(layer, 4)).backward()
        # Each gate halves the 64 pairs: d(ones)/dg = 32; (x/16)^0.02 at x = 64.
        assert layer.gates.grad.tolist() == [pytest.approx(0.02 * 4**-0.98 / 16 * 32)] * 3
        layer.zero_grad()
        over_budget(group_complexity(layer, 1)).backward()
        assert not layer.gates.grad.any()
