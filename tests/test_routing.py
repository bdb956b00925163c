import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.routing import SigmoidRouter, SoftmaxAttention, SoftmaxRouter, aggregation, named_routers, watch
from tests.tolerances import assert_close

MODES = ["attention", "average", "max", "shuffle_per_image", "shuffle_across_images"]


class Layer(nn.Module):
    """A user's own routed layer: its input is what its router gives, its output is the routing weights it sees."""

    def __init__(self, router: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router or nn.Identity()

    def forward(self, weights: Tensor) -> Tensor:
        return self.router(weights)

    def routers(self) -> dict[str, nn.Module]:
        return {"router": self.router}


class Branches(nn.Module):
    """A user's own layer with two routers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Identity(), nn.Identity()

    def forward(self, weights: Tensor) -> Tensor:
        return self.left(weights) + self.right(10 * weights)

    def routers(self) -> dict[str, nn.Module]:
        return {"left": self.left, "right": self.right}


class Counting:
    """A backend of torch.compile that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(
        DynamicConv2d(4, 6, 3, num_kernels=3, temperature=1),
        nn.ReLU(),
        nn.Sequential(CondConv2d(6, 5, 3, num_experts=2)),
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 4, 7, 6)


def aggregated(weights: Tensor, mode: str, seed: int = 0) -> Tensor:
    layer = Layer()
    with aggregation(layer, mode, Generator().manual_seed(seed)):
        return layer(weights)


class TestRouters:
    def test_sigmoid_by_hand(self) -> None:
        router = SigmoidRouter(2, 3).double()
        router.fc.weight.data = torch.tensor([[1, 0], [0, 2], [-1, 1]]).double()
        router.fc.bias.data = torch.tensor([0, 1, 0.5]).double()
        x = torch.tensor([[[[1.0, 3]], [[0, -2]]]]).double()  # means 2 and -1
        expected = [[1 / (1 + math.exp(-logit)) for logit in (2, -1, -2.5)]]
        assert_close(router(x), torch.tensor(expected, dtype=torch.float64))

    def test_softmax_by_hand(self) -> None:
        router = SoftmaxAttention(2, 3, reduction=1, temperature=2).double()
        router.fc1.weight.data = torch.tensor([[1.0, 1], [0, 1]]).double()
        router.fc2.weight.data = torch.tensor([[2.0, 5], [0, 5], [-2, 5]]).double()
        router.fc2.bias.data = torch.tensor([0, 1.0, 0]).double()
        x = torch.tensor([[[[1.0, 3]], [[0, -2]]]]).double()  # means 2 and -1, hidden units 1 and relu(-1) = 0
        odds = [math.exp(logit / 2) for logit in (2, 1, -2)]
        assert_close(router(x), torch.tensor([[odd / sum(odds) for odd in odds]], dtype=torch.float64))

    @pytest.mark.parametrize(("reduction", "hidden"), [(4, 2), (3, 3), (100, 1)])
    def test_hidden_units_are_rounded_and_at_least_one(self, reduction: float, hidden: int) -> None:
        assert SoftmaxAttention(10, 3, reduction).fc1.weight.shape == (hidden, 10)

    @pytest.mark.parametrize(
        "router", [SigmoidRouter(4, 3), SoftmaxRouter(4, 3, hidden=2), SoftmaxAttention(4, 3, temperature=1)]
    )
    def test_float32_under_autocast(self, router: nn.Module, images: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            weights, of_bfloat16 = router(images), router(images.bfloat16())
        assert weights.dtype == of_bfloat16.dtype == torch.float32
        assert torch.equal(weights, router(images))
        assert_close(of_bfloat16, weights, torch.bfloat16)

    def test_types_without_autocast(self, images: Tensor) -> None:
        with pytest.raises(RuntimeError, match="dtype"):
            SigmoidRouter(4, 3)(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert SoftmaxAttention(4, 3).bfloat16()(images).dtype == torch.float32

    def test_compiles_under_autocast(self, images: Tensor) -> None:
        router = SoftmaxAttention(4, 3)
        with torch.autocast("cpu", torch.bfloat16):
            compiled = torch.compile(router, fullgraph=True)(images.bfloat16())
            assert_close(compiled, router(images.bfloat16()), torch.bfloat16)

    def test_softmax_rows_sum_to_one_in_bfloat16(self, images: Tensor) -> None:
        weights = SoftmaxAttention(4, 50, temperature=1).bfloat16()(images.bfloat16())
        assert_close(weights.sum(1), torch.ones(3))

    @pytest.mark.parametrize(("router", "count"), [(SigmoidRouter, "num_experts"), (SoftmaxAttention, "num_kernels")])
    def test_refuse_no_kernels(self, router: type[nn.Module], count: str) -> None:
        with pytest.raises(ValueError, match=f"{count}=0 must be at least 1"):
            router(4, 0)


class TestWatch:
    def test_reads_every_routed_layer_by_name(self, model: nn.Module, images: Tensor) -> None:
        with watch(model) as routing:
            assert routing == {}
            model(images)
        assert {name: weights.shape for name, weights in routing.items()} == {"0": (3, 3), "2.0": (3, 2)}
        assert torch.equal(routing["0"], model[0].router(images))
        assert not any(weights.requires_grad for weights in routing.values())

    def test_gives_the_latest_pass_and_stops_at_the_end(self) -> None:
        layer = Layer()
        first, second, third = torch.rand(3, 2, 4)
        with watch(layer) as routing:
            layer(first)
            layer(second)
        layer(third)
        assert torch.equal(routing["router"], second)

    def test_stops_on_an_exception(self) -> None:
        layer = Layer()
        with pytest.raises(RuntimeError, match="mine"), watch(layer) as routing:
            raise RuntimeError("mine")
        layer(torch.rand(2, 3))
        assert routing == {}

    def test_names_each_router_of_a_layer(self) -> None:
        model, weights = nn.Sequential(Branches()), torch.rand(2, 3)
        with watch(model) as routing:
            model(weights)
        assert set(routing) == {"0.left", "0.right"}
        assert torch.equal(routing["0.right"], 10 * weights)
        assert list(named_routers(model[0])) == ["left", "right"]

    def test_sees_what_aggregation_changed(self) -> None:
        layer = Layer()
        with aggregation(layer, "average"), watch(layer) as routing:
            layer(torch.tensor([[0.5, 1.0]]))
        assert torch.equal(routing["router"], torch.tensor([[0.75, 0.75]]))

    def test_nothing_routed(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 3))
        with watch(model) as routing:
            model(torch.randn(2, 4, 7, 6))
        assert routing == {}

    def test_works_on_a_model_compiled_before(self, model: nn.Module, images: Tensor) -> None:
        torch.compiler.reset()
        compiled = torch.compile(model, backend=(backend := Counting()))
        expected = compiled(images)
        assert backend.runs == 1
        with watch(compiled) as routing:
            assert_close(compiled(images), expected)
        assert [weights.shape for weights in routing.values()] == [(3, 3), (3, 2)]
        assert backend.runs == 1
        compiled(images)
        assert backend.runs == 2


class TestAggregation:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("attention", [[0.5, 0.25, 0.125], [0.25, 0.75, 0.5]]),
            ("average", [[0.875 / 3] * 3, [0.5, 0.5, 0.5]]),
            ("max", [[0.875, 0, 0], [0, 1.5, 0]]),
            ("shuffle_across_images", [[0.25, 0.75, 0.5], [0.5, 0.25, 0.125]]),
        ],
    )
    def test_by_hand(self, mode: str, expected: list[list[float]]) -> None:
        weights = torch.tensor([[0.5, 0.25, 0.125], [0.25, 0.75, 0.5]])
        assert_close(aggregated(weights, mode), torch.tensor(expected))

    def test_shuffle_per_image_permutes_each_row_by_itself(self) -> None:
        weights = torch.rand(1, 4).expand(20, 4)
        actual = aggregated(weights, "shuffle_per_image")
        assert torch.equal(actual.sort(1).values, weights.sort(1).values)
        assert len(actual.unique(dim=0)) > 2

    @pytest.mark.parametrize("batch", [2, 3, 5])
    def test_shuffle_across_images_has_no_fixed_point(self, batch: int) -> None:
        weights = torch.rand(batch, 4)
        for seed in range(50):
            actual = aggregated(weights, "shuffle_across_images", seed)
            assert not (actual == weights).all(1).any()
            assert sorted(actual.tolist()) == sorted(weights.tolist())

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "shuffle_across_images"])
    def test_keeps_the_mass_of_each_sample(self, mode: str) -> None:
        weights = torch.rand(5, 4)
        assert_close(aggregated(weights, mode).sum(1), weights.sum(1))

    @pytest.mark.parametrize("mode", MODES)
    def test_takes_an_empty_batch(self, mode: str) -> None:
        assert aggregated(torch.rand(0, 3), mode).shape == (0, 3)

    @pytest.mark.parametrize("mode", ["shuffle_per_image", "shuffle_across_images"])
    def test_the_seed_decides(self, mode: str) -> None:
        weights = torch.rand(9, 4)
        assert torch.equal(aggregated(weights, mode, 3), aggregated(weights, mode, 3))
        assert not torch.equal(aggregated(weights, mode, 3), aggregated(weights, mode, 4))
        layer = Layer()
        with aggregation(layer, mode):
            default = layer(weights)
            assert not torch.equal(layer(weights), default)
        assert torch.equal(aggregated(weights, mode, 0), default)

    def test_refuses_to_shuffle_one_image(self) -> None:
        with pytest.raises(ValueError, match="needs at least 2 images in a batch, this one has 1"):
            aggregated(torch.rand(1, 3), "shuffle_across_images")

    def test_unknown_mode_lists_those_that_exist(self) -> None:
        with (
            pytest.raises(ValueError, match=rf"mode='mean' does not exist, choose one of \['{MODES[0]}', .*{MODES[4]}"),
            aggregation(Layer(), "mean"),
        ):
            pass

    @pytest.mark.parametrize("mode", ["average", "max"])
    def test_changes_the_output_of_the_package_s_layers(self, mode: str, model: nn.Module, images: Tensor) -> None:
        first = model[0]
        before = first(images)
        kernel = {"average": first.weight.mean(0), "max": first.weight[first.router(images)[0].argmax()]}[mode]
        with aggregation(model, mode):
            actual = first(images)
        assert_close(actual[:1], nn.functional.conv2d(images[:1], kernel))
        assert torch.equal(first(images), before)

    def test_stops_on_an_exception(self) -> None:
        layer, weights = Layer(), torch.rand(2, 3)
        with pytest.raises(RuntimeError, match="mine"), aggregation(layer, "average"):
            raise RuntimeError("mine")
        assert torch.equal(layer(weights), weights)

    def test_every_router_of_a_layer(self) -> None:
        layer = Branches()
        with aggregation(layer, "average"):
            assert_close(layer(torch.tensor([[0.5, 1.0]])), torch.tensor([[8.25, 8.25]]))

    def test_a_shared_router_is_shuffled_once(self) -> None:
        first = Layer()
        model, weights = nn.ModuleList([first, Layer(first.router)]), torch.rand(2, 3)
        with aggregation(model, "shuffle_across_images"):
            assert torch.equal(first(weights), weights.flip(0))

    def test_works_on_a_model_compiled_before(self, model: nn.Module, images: Tensor) -> None:
        torch.compiler.reset()
        compiled = torch.compile(model, backend=Counting())
        before = compiled(images)
        with aggregation(model, "max"):
            expected = model(images)
        with aggregation(compiled, "max"):
            assert_close(compiled(images), expected)
        assert (before - expected).abs().max() > 0.01
        assert_close(compiled(images), before)
