"""CondConv's routing functions: who shares a router, and that it runs once per forward pass, whatever is around it."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyn_lightning.convert import convert
from dyn_lightning.cost import parameters
from dyn_lightning.layers import CondConv2d, CondLinear
from dyn_lightning.routing import (
    ROUTERS,
    SigmoidRouter,
    SoftmaxAttention,
    SoftmaxRouter,
    aggregation,
    named_routers,
    watch,
)
from dyn_lightning.sharing import HierarchicalRouter
from tests.noise import fill_with_noise_, randomize_norms_
from tests.tolerances import assert_close


class Block(nn.Module):
    """A residual block that can checkpoint itself, or each of its convolutions."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.tanh(self.conv1(x)))


class Net(nn.Module):
    """A stem and three blocks; ``around`` runs a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.around: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.around(block, x)
        return x.mean((2, 3))


def shared(share: str, **options: Any) -> Net:
    model = Net()
    convert(model, "condconv", share=share, num_experts=3, **options)
    return fill_with_noise_(model.double(), scale=0.5)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 7, 6, generator=torch.Generator().manual_seed(batch)).double()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def owners(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, SigmoidRouter)]


class TestScopes:
    def test_layers_are_watched_in_the_order_in_which_they_run(self) -> None:
        """Not all that share a router where it runs."""
        model = Net()
        include = ["blocks.0.conv1", "blocks.2.conv2"]
        convert(model, "condconv", include=include, share="model", num_experts=3)
        convert(model, "condconv", include=["blocks.1.conv1"], num_experts=2)
        with watch(model) as routing:
            model(images().float())
        assert list(routing) == ["blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv2"]
        assert torch.equal(routing["blocks.0.conv1"], routing["blocks.2.conv2"])

    @pytest.mark.parametrize(("share", "count"), [("layer", 6), ("block", 3), ("stage", 1), ("model", 1)])
    def test_of_a_small_network(self, share: str, count: int) -> None:
        model = shared(share)
        assert len(owners(model)) == count
        assert len(named_routers(model)) == 6
        assert len({id(router) for router in named_routers(model).values()}) == count

    @pytest.mark.parametrize(
        ("build", "share", "count"),
        [
            (torchvision.models.resnet18, "block", 8),
            (torchvision.models.resnet18, "stage", 4),
            (torchvision.models.resnet18, "model", 1),
            (torchvision.models.mobilenet_v2, "block", 17 + 1),  # the last 1x1 is in no block
            (torchvision.models.mobilenet_v2, "stage", 5 + 1),
            (lambda: timm.create_model("resnet50", pretrained=False), "block", 16),
            (lambda: timm.create_model("tf_efficientnet_b0", pretrained=False), "stage", 7 + 1),
            (torchvision.models.densenet121, "stage", 4 + 3),  # three transitions
            (torchvision.models.vgg11, "model", 1),
        ],
    )
    def test_of_backbones(self, build: Callable[[], nn.Module], share: str, count: int) -> None:
        with torch.device("meta"):
            model = build()
            convert(model, "condconv", share=share, num_experts=2)
        assert len(owners(model)) == count

    def test_the_router_sees_the_first_layer_s_input(self) -> None:
        model, seen = shared("block"), []
        first = model.blocks[1].conv1
        first.router.register_forward_pre_hook(lambda router, args: seen.append(args[0]))
        first.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        model(images())
        assert seen[0] is seen[1]

    def test_equals_the_equation(self) -> None:
        model, x = shared("model"), images()
        alone = Net().double()
        alone.load_state_dict({name: torch.zeros_like(value) for name, value in alone.state_dict().items()})
        for image, actual in zip(x, model(x), strict=True):
            y = model.stem(image[None])
            weights = model.blocks[0].conv1.router(y)[0]
            for block, plain in zip(model.blocks, alone.blocks, strict=True):
                for layer, conv in ((block.conv1, plain.conv1), (block.conv2, plain.conv2)):
                    conv.weight.data = torch.einsum("k,koihw->oihw", weights, layer.weight)
                    conv.bias.data = weights @ layer.bias
                y = plain(y)
            assert_close(actual, y.mean((2, 3))[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"share": "blocks"}, "share='blocks' must be one of ['layer', 'block', 'stage', 'model']"),
            (
                {"share": "block", "include": ["blocks.?.conv1"]},
                "share='block' would share no router: no two of the replaced layers are in one block; use share=",
            ),
            ({"router": "tanh"}, "router='tanh' does not exist, choose one of ['sigmoid', 'softmax', 'hidden_small'"),
            ({"router": 3}, "router=3 does not exist, choose one of ['sigmoid', 'softmax', 'hidden_small'"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        model = Net()
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(model, "condconv", **options)
        assert type(model.blocks[0].conv1) is nn.Conv2d

    @pytest.mark.parametrize("options", [{"share": "model"}, {"hierarchical": True}])
    @pytest.mark.parametrize("conv", ["doconv", "ghost", "dynamic"])
    def test_refuses_layers_without_a_router(self, conv: str, options: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match="share and hierarchical need a layer with one router, given by the option"
        ):
            convert(Net(), conv, **options)


class TestSharedRouter:
    @pytest.mark.parametrize("share", ["block", "stage", "model"])
    def test_runs_once_per_forward_pass(self, share: str) -> None:
        model, count = shared(share), []
        for router in set(named_routers(model).values()):
            router.register_forward_hook(lambda *_: count.append(1))
        model(images())
        assert len(count) == len(owners(model))

    def test_is_saved_once(self) -> None:
        model = shared("model")
        assert [name for name in model.state_dict() if "router" in name] == [
            "blocks.0.conv1.router.fc.weight",
            "blocks.0.conv1.router.fc.bias",
        ]
        other = shared("model")
        fill_with_noise_(other, seed=1)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(images()), model(images()))

    @pytest.mark.parametrize("options", [{"share": "block"}, {"share": "model"}, {"hierarchical": True}])
    def test_upcycled_network_keeps_its_output(self, options: dict[str, Any]) -> None:
        model, x = fill_with_noise_(Net().double()), images()
        before = model(x)
        convert(model, "condconv", upcycle=True, num_experts=3, **options)
        assert_close(model(x), before)

    @pytest.mark.parametrize(
        "options", [{"share": "block"}, {"share": "model"}, {"share": "layer", "hierarchical": True}]
    )
    def test_deepcopy_is_independent(self, options: dict[str, Any]) -> None:
        model, x = shared(**options), images()
        model(x).sum().backward()  # weights with a graph are around
        before, other = model(x), copy.deepcopy(model)
        assert torch.equal(other(x), before)
        fill_with_noise_(other, seed=1)
        changed = other(x)
        assert not torch.allclose(changed, before)
        assert torch.equal(model(x), before)
        assert torch.equal(other(x), changed)
        routers, others = set(named_routers(model).values()), set(named_routers(other).values())
        assert len(routers) == len(others)
        assert not routers & others

    def test_pickles(self) -> None:
        model, x = shared("block"), images()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize("options", [{"share": "model"}, {"share": "block", "hierarchical": True}])
    def test_compiles_to_one_graph(self, options: dict[str, Any]) -> None:
        model, x = shared(**options), images()
        expected = gradients(model, x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), model(x))
        compiled(images(3))
        assert_close(gradients(compiled, x), expected)

    @pytest.mark.parametrize("mode", ["max", "average", "shuffle_per_image", "shuffle_across_images"])
    def test_aggregation_reaches_all_who_share(self, mode: str) -> None:
        model, x, used = shared("model"), images(3), []
        for layer in (model.blocks[0].conv1, model.blocks[2].conv2):
            layer.router.register_forward_hook(lambda router, args, output: used.append(output))
        with aggregation(model, mode), watch(model) as routing:
            model(x)
        assert torch.equal(used[-1], routing["blocks.0.conv1"])
        assert torch.equal(used[-1], routing["blocks.2.conv2"])
        changed = used[-1]
        assert not torch.allclose(model.blocks[0].conv1.router(model.stem(x)), changed)

    def test_needs_the_other_layer_before_it(self) -> None:
        model = shared("block")
        with pytest.raises(
            RuntimeError, match="takes the routing weights of an earlier layer, which has not run before"
        ):
            model.blocks[0].conv2(torch.randn(2, 4, 7, 6).double())

    def test_weights_of_another_pass_are_not_taken(self) -> None:
        class Skipping(Net):
            skip = False

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                for block in self.blocks[1:] if self.skip else self.blocks:
                    x = block(x)
                return x

        model = Skipping()
        convert(model, "condconv", share="model")
        model(torch.randn(2, 3, 7, 6))
        model.skip = True
        with pytest.raises(
            RuntimeError, match="takes the routing weights of an earlier layer, which has not run before"
        ):
            model(torch.randn(2, 3, 7, 6))

    def test_weight_decay_and_trainable_parameters_count_it_once(self) -> None:
        assert len(list(shared("model").parameters())) == 2 + 6 * 2 + 2


UNCERTAIN = "they may be those of another forward pass, or lack their gradient: checkpoint these layers together"


def checkpointed(use_reentrant: bool = False) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)


class TestCheckpointing:
    """Of activations: the layers run again in the backward pass."""

    @pytest.mark.parametrize(
        "options",
        [{"share": "block"}, {"share": "stage"}, {"share": "model"}, {"share": "layer", "hierarchical": True}],
    )
    def test_gives_the_same_gradients(self, options: dict[str, Any]) -> None:
        model, x = shared(**options), images()
        expected = gradients(model, x)
        assert all(gradient.any() for gradient in expected)
        model.around = checkpointed()
        for _ in range(2):
            assert_close(gradients(model, x), expected)
        model(x)  # a pass without a backward pass is forgotten
        assert_close(gradients(model, x), expected)

    def test_reentrant_within_a_block(self) -> None:
        model, x = shared("block"), images()
        expected = gradients(model, x)
        model.around = checkpointed(use_reentrant=True)
        assert_close(gradients(model, x), expected)

    def test_two_passes_before_the_backward_pass(self) -> None:
        def both(model: Net) -> list[Tensor]:
            model.zero_grad()
            (model(images(2)).sum() + model(images(3)).square().sum()).backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        for share in ("block", "model"):
            model = shared(share)
            expected = both(model)
            model.around = checkpointed()
            if share == "block":  # each block runs its own router again
                assert_close(both(model), expected)
            else:
                with pytest.raises(RuntimeError, match=UNCERTAIN):
                    both(model)

    def test_reentrant_across_blocks_is_refused(self) -> None:
        model = shared("model")
        model.around = checkpointed(use_reentrant=True)
        with pytest.raises(RuntimeError, match=UNCERTAIN):
            model(images().requires_grad_()).sum().backward()

    @pytest.mark.parametrize("frozen", [["router"], ["router", "stem"]])
    @pytest.mark.parametrize("options", [{"share": "model"}, {"share": "block", "hierarchical": True}])
    def test_frozen_routers(self, options: dict[str, Any], frozen: list[str]) -> None:
        model, x = shared(**options), images()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))

        def grads(between: bool = False) -> list[Tensor]:
            model.zero_grad()
            y = model(x).square().sum()
            if between:
                with torch.no_grad():
                    model(images(3)[:2])
            y.backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

        expected = grads()
        model.around = checkpointed()
        assert_close(grads(), expected)
        with pytest.raises(RuntimeError, match=UNCERTAIN):
            grads(between=True)
        if frozen == ["router"]:
            model.around = checkpointed(use_reentrant=True)
            with pytest.raises(RuntimeError, match=UNCERTAIN):
                grads()

    def test_a_graph_that_is_kept(self) -> None:
        model, x = shared("model"), images()
        model.around = checkpointed()
        kept = model(x).square().sum()
        kept.backward(retain_graph=True)
        model(images(3)).sum().backward()
        with pytest.raises(RuntimeError, match=UNCERTAIN):
            kept.backward()

    def test_losses_that_are_kept_do_not_count(self) -> None:
        model, x = shared("model"), images()
        expected = gradients(model, x)
        model.around = checkpointed()
        losses = []
        for _ in range(3):
            model.zero_grad()
            losses.append(model(x).square().sum())
            losses[-1].backward()
        assert_close([parameter.grad for parameter in model.parameters()], expected)

    def test_the_graph_is_let_go_after_the_backward_pass(self) -> None:
        model = shared("model")
        model(images()).sum().backward()
        assert model.blocks[0].conv2.router.latest.weights().is_leaf


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = shared("block", hierarchical=True)
    parallel = nn.parallel.DistributedDataParallel(model)
    x = images(4)
    (parallel(x[2 * rank : 2 * rank + 2]).square().sum() / 2).backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    model = shared("block", hierarchical=True)
    expected = [gradient / 4 for gradient in gradients(model, images(4))]
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


class TestRoutingFunctions:
    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("sigmoid", [16, 3]),
            ("softmax", [16, 3]),
            ("hidden_small", [16, 2, 3]),
            ("hidden_medium", [16, 16, 3]),
            ("hidden_large", [16, 128, 3]),
        ],
    )
    def test_of_the_ablation(self, name: str, sizes: list[int]) -> None:
        layer = fill_with_noise_(CondConv2d(16, 6, 3, num_experts=3, router=name).double(), scale=0.3)
        linears = [module for module in layer.router.modules() if isinstance(module, nn.Linear)]
        assert [linears[0].in_features, *(linear.out_features for linear in linears)] == sizes
        x = torch.randn(2, 16, 7, 6).double()
        hidden = x.mean((2, 3))
        for linear in linears:
            hidden = (hidden if linear is linears[0] else hidden.clamp(min=0)) @ linear.weight.T + linear.bias
        odds = hidden.exp()
        expected = odds / odds.sum(1, keepdim=True) if name == "softmax" else odds / (1 + odds)
        assert_close(layer.router(x), expected)
        assert_close(layer.router(x.mean((2, 3))), expected)

    @pytest.mark.parametrize("router", [*ROUTERS, SoftmaxRouter])
    def test_upcycling_keeps_the_output(self, router: Any) -> None:
        conv, x = fill_with_noise_(nn.Conv2d(4, 6, 3).double()), torch.randn(2, 4, 7, 6).double()
        layer = CondConv2d.from_conv(conv, num_experts=3, router=router)
        assert_close(layer(x), conv(x))

    def test_upcycling_refuses_a_router_that_it_cannot_make_constant(self) -> None:
        with pytest.raises(ValueError, match="SoftmaxAttention has no `constant_`"):
            CondConv2d.from_conv(nn.Conv2d(4, 6, 3), router=SoftmaxAttention)

    def test_hidden_must_be_a_number(self) -> None:
        with pytest.raises(ValueError, match="hidden=-1 must be a finite number, 0 or more"):
            SigmoidRouter(4, 3, hidden=-1)

    def test_hierarchical_sees_the_weights_before(self) -> None:
        model, x = shared("layer", hierarchical=True), images()
        routers = [layer.router for block in model.blocks for layer in (block.conv1, block.conv2)]
        assert [type(router) for router in routers] == [SigmoidRouter] + [HierarchicalRouter] * 5
        pooled = []
        for router in routers:
            router.register_forward_pre_hook(lambda router, args: pooled.append(args[0].mean((2, 3))))
        with watch(model) as routing:
            model(x)
        weights = list(routing.values())
        for before, after, router, features in zip(weights, weights[1:], routers[1:], pooled[1:], strict=False):
            matrix, bias = router.router.fc.weight, router.router.fc.bias
            assert matrix.shape == (3, 4 + 3)
            assert_close(after, torch.sigmoid(torch.cat([features, before], 1) @ matrix.T + bias))

    def test_hierarchical_over_blocks_with_a_softmax(self) -> None:
        model = shared("block", hierarchical=True, router="softmax")
        routers = list(dict.fromkeys(named_routers(model).values()))
        assert [type(router) for router in routers] == [SoftmaxRouter, HierarchicalRouter, HierarchicalRouter]
        assert type(routers[2].router) is SoftmaxRouter
        assert all(gradient.any() for gradient in gradients(model, images()))


class TestCondLinear:
    def test_equals_the_equation(self) -> None:
        layer, x = fill_with_noise_(CondLinear(4, 6, num_experts=3).double()), torch.randn(2, 4).double()
        for row, y in zip(x, layer(x), strict=True):
            weights = torch.sigmoid(layer.router.fc.weight @ row + layer.router.fc.bias)
            assert_close(y, sum(weights[k] * (layer.weight[k] @ row + layer.bias[k]) for k in range(3)))

    @pytest.mark.parametrize("bias", [True, False])
    def test_from_linear_keeps_the_output(self, bias: bool) -> None:
        linear, x = fill_with_noise_(nn.Linear(4, 6, bias=bias).double()), torch.randn(2, 4).double()
        layer = CondLinear.from_linear(linear, num_experts=3, router="hidden_medium")
        assert_close(layer(x), linear(x))
        assert (layer.bias is None) == (not bias)
        assert linear.extra_repr() in layer.extra_repr()

    def test_takes_a_batch_of_vectors_only(self) -> None:
        with pytest.raises(ValueError, match=re.escape("input of shape (2, 3, 4) must be (B, in_features)")):
            CondLinear(4, 6)(torch.randn(2, 3, 4))

    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches_and_gradients(self, batch: int) -> None:
        layer = CondLinear(4, 6)
        layer(torch.randn(batch, 4)).sum().backward()
        assert layer.weight.grad.shape == (8, 6, 4)

    def test_each_expert_starts_as_a_linear_layer_does(self) -> None:
        expected = nn.Linear(64, 128).weight.abs().max().item()
        assert [w.abs().max().item() for w in CondLinear(64, 128, num_experts=2).weight] == [
            pytest.approx(expected, rel=0.01)
        ] * 2

    @pytest.mark.parametrize(("option", "value"), [("in_features", 0), ("out_features", -1), ("num_experts", 0)])
    def test_refuses(self, option: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{option}={value} must be at least 1"):
            CondLinear(**{"in_features": 4, "out_features": 6, option: value})

    @pytest.mark.parametrize("upcycle", [True, False])
    def test_convert_replaces_the_classifier(self, upcycle: bool) -> None:
        model, x = randomize_norms_(torchvision.models.resnet18(num_classes=7)).eval(), torch.randn(2, 3, 64, 48)
        logits = model(x)
        report = convert(model, "condconv", include="layer4.*", classifier=True, upcycle=upcycle, num_experts=3)
        assert type(model.fc) is CondLinear
        assert (report.rows[-1].name, report.rows[-1].after) == ("fc", "CondLinear")
        assert report.rows[-1].parameters_after == 3 * (512 + 1) * 7 + (512 + 1) * 3
        assert not upcycle or torch.allclose(model(x), logits, atol=1e-4)
        assert "fc" in named_routers(model)

    def test_convert_replaces_it_under_every_name_and_with_its_own_options(self) -> None:
        model = torchvision.models.resnet18(num_classes=7)
        model.head = model.fc
        convert(model, "condconv", include="layer4.1.conv2", classifier=True, num_experts=3, kernel_size=5)
        assert model.head is model.fc
        assert len(model.fc.weight) == 3

    def test_convert_replaces_the_classifier_alone(self) -> None:
        model = torchvision.models.resnet18()
        report = convert(model, "condconv", exclude="*", classifier=True, num_experts=3)
        assert [row.name for row in report.rows if not row.reason] == ["fc"]
        assert isinstance(model.fc, CondLinear)

    def test_convert_refuses_a_classifier_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match=r"classifier=True, but Net has no nn\.Linear"):
            convert(Net(), "condconv", classifier=True)
        with pytest.raises(
            ValueError, match=r"needs a layer with a linear form \(CondConv2d\), which DynamicConv2d has not"
        ):
            convert(torchvision.models.resnet18(), "dynamic", classifier=True)


class TestPublishedNetworks:
    def test_condconv_mobilenet_v2(self) -> None:
        """The last six blocks and the classifier, 8 experts; the port's classifier has no bias."""
        with torch.device("meta"):
            model = torchvision.models.mobilenet_v2()
            model.classifier[1] = nn.Linear(1280, 1000, bias=False)
            include = [f"features.{block}.*" for block in range(12, 18)]
            convert(model, "condconv", include=include, share="block", classifier=True)
        assert parameters(model) == 22_877_496

    @pytest.mark.parametrize("size", [224, 191])
    def test_condconv_efficientnet_equals_timm(self, size: int) -> None:
        theirs = timm.create_model("tf_efficientnet_cc_b0_4e", pretrained=False)
        theirs = randomize_norms_(theirs).eval()
        ours = timm.create_model("tf_efficientnet_b0", pretrained=False).eval()
        include = ["blocks.4.*", "blocks.5.*", "blocks.6.*"]
        report = convert(ours, "condconv", include=include, share="block", num_experts=4)
        assert len(report.replaced) == 24
        assert parameters(ours) == 13_314_116
        theirs_state, state = theirs.state_dict(), {}
        for name, value in ours.state_dict().items():
            # Our router is in the first layer of the block that shares it.
            source = name.replace("conv_pw.router.fc", "routing_fn")
            state[name] = theirs_state.pop(source).reshape(value.shape)
        assert not theirs_state
        ours.load_state_dict(state)
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected, actual = theirs(x), ours(x)
        assert expected.std() > 0.1
        assert (actual - expected).abs().max() < 1e-4
