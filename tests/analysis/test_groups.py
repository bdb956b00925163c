import pytest
import torch
from torch import Tensor, nn

from dyn_lightning.analysis.groups import count_groups, gates
from dyn_lightning.layers.dg_conv import DGConv2d


def slowly(membership: Tensor) -> int:
    """Walk from each output that was not seen yet to all channels that it is connected with."""
    left, groups = {output for output, row in enumerate(membership.tolist()) if any(row)}, 0
    while left:
        groups += 1
        todo = [left.pop()]
        while todo:
            inputs = membership[todo.pop()].nonzero().flatten().tolist()
            near = {output for output in left if membership[output, inputs].any()}
            left -= near
            todo += near
    return groups


class TestCountGroups:
    @pytest.mark.parametrize("density", [0.03, 0.1, 0.2, 0.5])
    @pytest.mark.parametrize("shape", [(9, 7), (5, 12), (30, 20), (1, 4), (4, 1)])
    def test_against_walks(self, shape: tuple[int, int], density: float) -> None:
        for _ in range(10):
            membership = (torch.rand(shape) < density).float()
            assert count_groups(membership) == slowly(membership)

    @pytest.mark.parametrize(
        "sizes", [[(2, 3)], [(2, 3), (4, 1), (1, 1)], [(3, 2)] * 5, [(1, 1)] * 8, [(7, 4), (1, 9)]]
    )
    @pytest.mark.parametrize("isolated", [(0, 0), (3, 0), (0, 2), (2, 5)])
    def test_blocks_in_any_order(self, sizes: list[tuple[int, int]], isolated: tuple[int, int]) -> None:
        blocks = torch.block_diag(*map(torch.ones, sizes), torch.zeros(isolated))
        mixed = blocks[torch.randperm(len(blocks))][:, torch.randperm(blocks.shape[1])]
        assert count_groups(mixed) == len(sizes)

    def test_connected_through_others(self) -> None:
        """Output 0 and output 2 share no input, but each shares one with output 1."""
        chain = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
        assert count_groups(chain) == 2
        assert count_groups(chain.mT) == 2

    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (6, 2)])
    def test_nothing_and_everything_connected(self, shape: tuple[int, int]) -> None:
        assert count_groups(torch.zeros(shape)) == 0
        assert count_groups(torch.ones(shape)) == 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        assert count_groups(torch.block_diag(torch.ones(2, 3), torch.ones(4, 1)).to(dtype)) == 2

    @pytest.mark.parametrize(
        ("signs", "groups"), [([1, 1, 1], 1), ([-1, 1, 1], 2), ([1, -1, 1], 2), ([1, 1, -1], 3), ([-1, -1, -1], 12)]
    )
    def test_of_a_layer(self, signs: list[int], groups: int) -> None:
        """The factors of gcd(12, 24) are 2, 2 and 3; what is connected has a gradient."""
        layer = DGConv2d(12, 24, 1)
        with torch.no_grad():
            layer.gates.copy_(torch.tensor(signs))
        assert layer.membership().requires_grad
        assert count_groups(layer.membership()) == groups


class Layer(nn.Module):
    """Membership from two parameters, of four; ``differentiable`` as a straight-through estimator is."""

    def __init__(self, differentiable: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.rows = nn.Parameter(torch.randn(4))
        self.columns = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(4))
        self.differentiable = differentiable

    def membership(self) -> Tensor:
        values = self.rows[:, None] + self.columns
        binary = (values > 0).float()
        return binary + values - values.detach() if self.differentiable else binary


class TestGates:
    @pytest.mark.parametrize("gate_init", ["random", "dense", "depthwise"])
    def test_of_dgconv(self, gate_init: str) -> None:
        layer = DGConv2d(8, 12, 3, gate_init=gate_init)
        (found,) = gates(layer)
        assert found is layer.gates

    def test_several(self) -> None:
        layer = Layer()
        assert [id(parameter) for parameter in gates(layer)] == [id(layer.rows), id(layer.columns)]

    def test_nothing_is_left_behind(self) -> None:
        layer = Layer()
        layer.rows.grad = torch.ones(4)
        gates(layer)
        assert layer.rows.grad.tolist() == [1] * 4
        assert [layer.weight.grad, layer.columns.grad, layer.bias.grad] == [None] * 3

    def test_without_a_gradient(self) -> None:
        assert gates(Layer(differentiable=False)) == []

    def test_of_frozen_layers(self) -> None:
        assert gates(Layer().requires_grad_(False)) == []
        assert gates(DGConv2d(8, 12, 3).requires_grad_(False)) == []

    def test_some_are_frozen(self) -> None:
        layer = Layer()
        layer.rows.requires_grad_(False)
        (found,) = gates(layer)
        assert found is layer.columns
        conv = DGConv2d(8, 12, 3)
        conv.gates.requires_grad_(False)
        assert gates(conv) == []

    def test_where_gradients_are_off(self) -> None:
        """As in callbacks while a network is evaluated."""
        layer, conv = Layer(), DGConv2d(8, 12, 3)
        with torch.no_grad():
            found = [*gates(layer), *gates(conv)]
            assert gates(Layer(differentiable=False)) == gates(Layer().requires_grad_(False)) == []
            assert not torch.is_grad_enabled()
        assert [id(parameter) for parameter in found] == [id(layer.rows), id(layer.columns), id(conv.gates)]
