import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from dyn_lightning.conv2d import BatchNorm2d
from dyn_lightning.convert import convert
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.fold import ChannelShift, fold, norms_behind
from dyn_lightning.layers import CONVS, DGConv2d, DOConv2d
from dyn_lightning.layers.dg_conv import PermutedConv2d
from tests.noise import fill_with_noise_, randomize_norms_
from tests.tolerances import assert_close


def network(build: Callable[..., nn.Module], conv: str = "static", **options: Any) -> nn.Module:
    model = build(num_classes=7)
    if conv != "static":
        convert(model, conv, **options)
    return randomize_norms_(model).double().eval()


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def images(size: tuple[int, int] = (64, 48), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *size, dtype=dtype)


def assert_same(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        y, expected = folded(x), model(x)
    scale = expected.std()
    assert scale > 1e-6
    assert_close(y / scale, expected / scale)


class TestFold:
    def test_do_conv_resnet_loads_into_the_plain_one(self) -> None:
        model, x = network(torchvision.models.resnet18, "doconv"), images()
        fill_with_noise_(model, scale=0.05)
        folded = fold(model, batch_norm=False)
        plain = torchvision.models.resnet18(num_classes=7).double().eval()
        plain.load_state_dict(folded.state_dict(), strict=True)
        assert_same(plain, model, x)
        assert_same(folded, model, x)
        assert_same(fold(model), model, x)
        assert parameters(folded) == parameters(plain) < parameters(model)
        assert multiply_adds(folded, (3, 32, 32)) == multiply_adds(plain, (3, 32, 32))

    def test_leaves_the_model_as_it_is(self) -> None:
        model, x = network(torchvision.models.resnet18, "dgconv").train(), images()
        state, text = copy.deepcopy(model.state_dict()), repr(model)
        folded = fold(model)
        assert not any(module.training for module in folded.modules())
        assert all(module.training for module in model.modules())
        assert repr(model) == text
        fill_with_noise_(folded, seed=1)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model(x).shape == (2, 7)

    @pytest.mark.parametrize("conv", CONVS)
    def test_keeps_the_outputs_of_every_layer(self, conv: str) -> None:
        options = {"condconv": {"num_experts": 3}, "dynamic": {"num_kernels": 3, "temperature": 2}}.get(conv, {})
        model = network(partial(ResNet, Bottleneck, [1, 1, 1, 1]), conv, **options)
        folded = fold(model)
        assert_same(folded, model, images((33, 47)))
        # All norms are moved, but the ones behind what is not linear in its weights.
        left = {"compconv": 4, "ghost": 16, "involution": 4, "scconv": 4}.get(conv, 0)
        assert len(norms(folded)) == left

    def test_keeps_the_outputs_to_1e_5_in_float32(self) -> None:
        for conv in ("doconv", "dgconv"):
            model, x = network(torchvision.models.resnet18, conv).float(), images(dtype=torch.float32)
            with torch.no_grad():
                assert (fold(model)(x) - model(x)).abs().max() < 1e-5

    @pytest.mark.parametrize("name", ["tf_efficientnet_b0", "mobilenetv3_small_100", "resnet26d", "densenet121"])
    def test_networks_of_timm(self, name: str) -> None:
        model = randomize_norms_(timm.create_model(name, pretrained=False, num_classes=7)).double().eval()
        folded = fold(model)
        assert_same(folded, model, images((65, 47)))
        assert len(norms(folded)) == {"densenet121": 62}.get(name, 0)

    @pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "googlenet", "convnext_tiny"])
    def test_networks_of_torchvision(self, name: str) -> None:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        model = network(lambda num_classes: getattr(torchvision.models, name)(num_classes=num_classes, **options))
        folded = fold(model)
        assert_same(folded, model, images())
        # DenseNet's norms are behind a concatenation, but for the stem's and each layer's second.
        assert len(norms(folded)) == {"densenet121": 121 - 1 - 58}.get(name, 0)

    def test_one_layer_alone(self) -> None:
        folded = fold(DOConv2d(4, 6, 3))
        assert type(folded) is nn.Conv2d
        assert type(fold(DGConv2d(8, 8, 1, gate_init="dense"))) is nn.Conv2d

    def test_a_layer_of_two_names_stays_one(self) -> None:
        layer = fill_with_noise_(DOConv2d(4, 4, 3, padding=1).double())
        model, x = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)), torch.randn(2, 4, 7, 6).double()
        folded = fold(model)
        assert folded[0] is folded[1][1]
        assert_same(folded, model, x)

    def test_a_method_of_that_name_that_wants_more_is_something_else(self) -> None:
        class Folding(nn.Module):
            def fold(self, x: Tensor, size: int) -> Tensor:
                return x

        assert type(fold(nn.Sequential(Folding()))[0]) is Folding

    def test_a_user_s_own_foldable_layer(self) -> None:
        class Doubled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

            def fold(self) -> nn.Module:
                return nn.Conv2d(1, 1, 1)

        assert isinstance(fold(nn.Sequential(Doubled()))[0], nn.Conv2d)


class TestBatchNorm:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("gates", range(8))
    def test_behind_a_permuted_convolution(self, gates: int, bias: bool) -> None:
        conv = fill_with_noise_(DGConv2d(8, 16, 3, bias=bias).double())
        with torch.no_grad():
            conv.gates.copy_(torch.tensor([1 if gates >> k & 1 else -1 for k in range(3)]))
        model = nn.Sequential(conv, randomize_norms_(nn.BatchNorm2d(16).double())).eval()
        folded = fold(model)
        assert type(folded[0]) in (nn.Conv2d, PermutedConv2d)
        assert type(folded[1]) is nn.Identity
        assert_same(folded, model, torch.randn(2, 8, 7, 6).double())

    @pytest.mark.parametrize("conv", ["condconv", "dynamic"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_behind_mixed_kernels_leaves_a_shift(self, bias: bool, conv: str) -> None:
        layer = fill_with_noise_(CONVS[conv](4, 6, 3, bias=bias).double())
        model = nn.Sequential(layer, randomize_norms_(nn.BatchNorm2d(6).double())).eval()
        folded = fold(model)
        assert type(folded[1]) is ChannelShift
        assert_same(folded, model, torch.randn(5, 4, 7, 6).double())

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm])
    def test_of_every_kind(self, kind: type[nn.Module], affine: bool) -> None:
        norm = kind(6, affine=affine).double()
        norm.running_mean.normal_()
        model = nn.Sequential(nn.Conv2d(4, 6, 3).double(), norm).eval()
        assert_same(fold(model), model, torch.randn(2, 4, 7, 6).double())
        assert type(fold(model)[1]) is nn.Identity

    def test_without_statistics_stays(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).double().eval()
        assert len(norms(fold(model))) == 1

    def test_of_a_subclass_stays(self) -> None:
        class Own(nn.BatchNorm2d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) + 1

        model = nn.Sequential(nn.Conv2d(4, 6, 3), Own(6)).double().eval()
        assert_same(fold(model), model, torch.randn(2, 4, 7, 6).double())


class Residual(nn.Module):
    """The convolution's output goes to the norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Backwards(nn.Module):
    """The norm is registered behind the convolution but runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class Twice(nn.Module):
    """One norm behind two convolutions, one convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.again, self.last = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.two(self.norm(self.one(x))))
        return self.last(self.again(self.again(x)))


class Untraceable(nn.Module):
    """Code that looks at values, around a block whose code can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.inner(self.norm(self.conv(x)))


class Options(nn.Module):
    """Code that looks at its options, which have defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        x = self.norm(self.conv(x))
        return 2 * x if double else x


class Pair(nn.Module):
    """A block that its parent may use in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return self.conv(x) if skip else self.norm(self.conv(x))


class Around(nn.Module):
    """A parent of a pair, or of something else as ``inner``."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], inner: Callable[[], nn.Module] = Pair) -> None:
        super().__init__()
        self.inner, self.use = inner(), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.inner, x)


class Kept(Pair):
    """The convolution's output is put away for others."""

    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.conv(x)
        return self.norm(self.feature)


class Training(nn.BatchNorm2d):
    """Frozen the wrong way round."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))


def hooked(place: int, hook: Callable[..., Any], pre: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    (model[place].register_forward_pre_hook if pre else model[place].register_forward_hook)(hook)
    return model


def reused_element() -> nn.Module:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seq, self.norm = two_layers(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.seq(x)) + self.seq[1](x)

    return Reused()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "folded"),
    [
        (lambda: Around(lambda inner, x: inner(x) + inner.conv(x)), 0),
        (lambda: Around(lambda inner, x: inner(x) + inner.norm(x)), 0),
        (lambda: Around(lambda inner, x: inner(x) * inner.norm.weight.sum()), 0),
        (lambda: Around(lambda inner, x: inner(x) + nn.functional.conv2d(x, inner.conv.weight, padding=1)), 0),
        (lambda: Around(lambda inner, x: inner(x, skip=True)), 0),
        (lambda: Around(lambda inner, x: inner(x, True) + inner(x)), 0),
        (lambda: Around(lambda inner, x: inner(x)), 1),
        (lambda: Around(lambda inner, x: inner(x) + inner.feature, Kept), 0),
        (reused_element, 0),
        (tied, 2),
        (lambda: nn.Sequential(two_layers(), nn.BatchNorm2d(3)), 1),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)), 0),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)), 0),
        (lambda: hooked(0, lambda module, args, y: y.relu()), 0),
        (lambda: hooked(1, lambda module, args, y: 2 * y), 0),
        (lambda: hooked(1, lambda module, args: (2 * args[0],), pre=True), 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), Training(3)), 0),
    ],
)
def test_is_exact_around_unusual_code(build: Callable[[], nn.Module], folded: int) -> None:
    model, x = randomize_norms_(build()).double().eval(), images((9, 8))
    count = len(norms(model))
    static = fold(model)
    assert count - len(norms(static)) == folded
    with torch.no_grad():
        assert_close(static(x), model(x))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Residual, {}),
        (Backwards, {}),
        (Twice, {}),
        (Untraceable, {"inner.0": "inner.1"}),
        (Options, {"conv": "norm"}),
    ],
)
def test_only_what_follows_is_folded(model: Callable[[], nn.Module], expected: dict[str, str]) -> None:
    built = randomize_norms_(model()).double().eval()
    assert norms_behind(built) == expected
    assert_same(fold(built), built, images((19, 18)))
