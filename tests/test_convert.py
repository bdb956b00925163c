import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from dyn_lightning.convert import convert, resolve_conv
from dyn_lightning.layers import CONVS, CondConv2d, DynamicConv2d
from tests.noise import fill_with_noise_, randomize_norms_
from tests.tolerances import assert_close

FIRST, SHORTCUT, SQUEEZE = "the first convolution", "projection of a shortcut", "squeeze-and-excitation"
RESNET_LEFT = {"conv1": FIRST} | {f"layer{stage}.0.downsample.0": SHORTCUT for stage in (2, 3, 4)}


class Own(nn.Conv2d):
    """A user's own layer, without from_conv, with an option."""

    def __init__(self, *args: Any, own: int = 0, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.own = own


class Holding(nn.Module):
    """A user's own routed layer, which holds a convolution."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__()
        self.inner = nn.Conv2d(*args, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def routers(self) -> dict[str, nn.Module]:
        return {}


def picky(*args: Any, bias: bool, **kw: Any) -> nn.Module:
    """A layer that refuses some arguments."""
    if not bias:
        raise ValueError("mine")
    return Own(*args, **kw)


def small() -> nn.Sequential:
    """Three convolutions: 0, 2, 4."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=(2, 1), groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 5, (1, 3), dilation=(1, 2), bias=False),
    )


def types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.fixture
def resnet() -> Iterator[nn.Module]:
    """A ResNet-18 without data."""
    with torch.device("meta"):
        yield torchvision.models.resnet18()


class TestDefaultRule:
    """The papers': the first convolution, shortcuts and squeeze-and-excitation are left."""

    @pytest.mark.parametrize("conv", ["dynamic", "condconv"])
    @pytest.mark.parametrize(
        ("build", "count", "left"),
        [
            (torchvision.models.resnet18, 16, RESNET_LEFT),
            (partial(timm.create_model, "resnet18", pretrained=False), 16, RESNET_LEFT),
            (torchvision.models.mobilenet_v2, 51, {"features.0.0": FIRST}),
            (
                torchvision.models.mobilenet_v3_small,
                33,
                {"features.0.0": FIRST}
                | {f"features.1.block.1.fc{number}": SQUEEZE for number in (1, 2)}
                | {f"features.{block}.block.2.fc{number}": SQUEEZE for block in range(4, 12) for number in (1, 2)},
            ),
        ],
    )
    def test_on_networks(self, build: Callable[[], nn.Module], count: int, left: dict[str, str], conv: str) -> None:
        with torch.device("meta"):
            model = build()
            report = convert(model, conv)
        assert report.left == left
        assert len(report.replaced) == count
        assert {type(model.get_submodule(name)) for name in report.replaced} == {CONVS[conv]}
        assert {type(model.get_submodule(name)) for name in report.left} == {nn.Conv2d}

    @pytest.mark.parametrize(
        ("build", "conv", "replaced"),
        [
            # Ghost: all but the first, downsampling included, depthwise left.
            (torchvision.models.resnet18, "ghost", lambda name, conv: name != "conv1"),
            (torchvision.models.mobilenet_v2, "ghost", lambda name, conv: conv.groups == 1 and name != "features.0.0"),
            # The 3x3 of a bottleneck, 32 groups in ResNeXt.
            (torchvision.models.resnet50, "involution", lambda name, conv: name.endswith("conv2")),
            (torchvision.models.resnext50_32x4d, "dgconv", lambda name, conv: name.endswith("conv2")),
            (torchvision.models.resnet50, "splitattention", lambda name, conv: name.endswith("conv2")),
            (torchvision.models.resnet50, "scconv", lambda name, conv: name.endswith("conv2")),
            (torchvision.models.resnet50, "compconv", lambda name, conv: name.endswith("conv2")),
            # Basic blocks: what involution cannot do is left.
            (torchvision.models.resnet18, "dgconv", lambda name, conv: name.startswith("layer") and "down" not in name),
            (
                torchvision.models.resnet18,
                "involution",
                lambda name, conv: name.startswith("layer") and conv.in_channels == conv.out_channels,
            ),
            # What is larger than 1x1, the stem and depthwise ones too.
            (torchvision.models.mobilenet_v2, "doconv", lambda name, conv: conv.kernel_size != (1, 1)),
            (torchvision.models.resnet50, "doconv", lambda name, conv: conv.kernel_size != (1, 1)),
        ],
    )
    def test_of_each_paper(
        self, build: Callable[[], nn.Module], conv: str, replaced: Callable[[str, nn.Conv2d], bool]
    ) -> None:
        with torch.device("meta"):
            model = build()
            convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
            report = convert(model, conv)
        assert report.replaced == [name for name, module in convolutions.items() if replaced(name, module)]
        assert {type(model.get_submodule(name)) for name in report.replaced} == {CONVS[conv]}

    @pytest.mark.parametrize("conv", [name for name in CONVS if name != "static"])
    def test_can_be_told_otherwise(self, conv: str) -> None:
        with torch.device("meta"):
            model = torchvision.models.resnet18()
            assert convert(model, conv, include="layer1.0.conv1").replaced == ["layer1.0.conv1"]

    @pytest.mark.parametrize("conv", [name for name in CONVS if name != "static"])
    def test_every_network_still_runs(self, conv: str) -> None:
        groups = {} if conv == "compconv" else {"groups": 32, "width_per_group": 4}  # as ResNeXt
        model, x = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, **groups).eval(), torch.randn(2, 3, 33, 47)
        assert len(convert(model, conv).replaced) >= 4
        assert model(x).shape == (2, 7)

    def test_subclasses_are_left_by_name(self) -> None:
        model = small()
        model[2] = Own(4, 6, 3)
        report = convert(model, "dynamic")
        assert report.left["2"] == "Own is a subclass of Conv2d and does something of its own"
        with pytest.raises(ValueError, match="Own is a subclass of Conv2d and does something of its own: leave this"):
            DynamicConv2d.from_conv(model[2])

    @pytest.mark.parametrize("upcycle", [True, False])
    def test_a_convolution_that_pads_by_itself(self, upcycle: bool) -> None:
        model = timm.create_model("tf_efficientnet_b0", pretrained=False).eval()
        x = torch.randn(2, 3, 63, 50)
        same = ["conv_stem", *(f"blocks.{stage}.0.conv_dw" for stage in (1, 2, 3, 5))]
        assert {type(model.get_submodule(name)).__name__ for name in same} == {"Conv2dSame"}
        logits = model(x)
        report = convert(model, "dynamic", upcycle=upcycle, num_kernels=2)
        assert len(report.replaced) == 48
        assert set(same) - set(report.replaced) == {"conv_stem"}
        assert model.blocks[5][0].conv_dw.padding == "same"
        if upcycle:
            assert_close(model(x), logits)
        assert model(x).shape == logits.shape

    def test_a_convolution_that_pads_by_itself_is_left_where_the_layer_cannot(self) -> None:
        with torch.device("meta"):
            model = timm.create_model("tf_efficientnet_b0", pretrained=False)
            report = convert(model, "doconv")
        text = "refused: padding='same' needs stride=1, not stride=(2, 2); give the padding as numbers"
        assert [name for name, reason in report.left.items() if reason == text] == [
            "conv_stem",
            *(f"blocks.{stage}.0.conv_dw" for stage in (1, 2, 3, 5)),
        ]

    def test_squeeze_and_excitation_has_to_be_named_in_full(self) -> None:
        with torch.device("meta"):
            model = timm.create_model("tf_efficientnet_b0", pretrained=False)
        name = "blocks.6.0.se.conv_reduce"
        report = convert(model, "dynamic", include="blocks.6.*")
        assert report.replaced == [f"blocks.6.0.conv_{end}" for end in ("pw", "dw", "pwl")]
        assert report.left[name] == SQUEEZE
        assert convert(model, "dynamic", include=[name]).replaced == [name]

    def test_involution_takes_the_paper_s_kernel(self) -> None:
        model, x = torchvision.models.resnet18(num_classes=7), torch.randn(2, 3, 33, 40)
        report = convert(model, "involution", include="layer1.*")
        assert report.rows[1].after == "Involution2d(64, 64, k=7x7)"
        assert model.layer1[0].conv1.padding == (3, 3)
        assert model(x).shape == (2, 7)
        with pytest.raises(ValueError, match=r"kernel_size=5: upcycle=True keeps the kernels in DOConv2d"):
            convert(model, "doconv", include="layer3.*", kernel_size=5, upcycle=True)
        for upcycle in (True, False):
            convert(model, "involution", include="layer2.1.*", kernel_size=5, upcycle=upcycle)
            assert model.layer2[1].conv1.kernel_size == (5, 5)
            assert model.layer2[1].conv1.padding == (2, 2)
            model.layer2[1] = copy.deepcopy(torchvision.models.resnet18().layer2[1])
        with pytest.raises(ValueError, match=r"kernel_size=\(4, 4\) in the place of \(3, 3\) would change the size"):
            convert(model, "involution", include="layer3.1.*", kernel_size=4)

    def test_kernel_size_keeps_the_size_of_the_output(self) -> None:
        model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding="valid")), torch.randn(2, 3, 9, 8)
        shape = model(x).shape
        convert(model, "involution")
        assert model(x).shape == shape
        with pytest.raises(ValueError, match=r"kernel_size=\(1, 1\) in the place of \(3, 3\) would change the size"):
            convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "doconv", kernel_size=1)

    def test_kernel_size_of_any_layer(self) -> None:
        model = small()
        convert(model, "static", include="4", kernel_size=(3, 5), dilation=1)
        assert repr(model[4]) == "Conv2d(6, 5, kernel_size=(3, 5), stride=(1, 1), padding=(1, 2), bias=False)"

    def test_split_attention_takes_the_place_of_the_norm_behind_it(self) -> None:
        model = torchvision.models.resnet50(num_classes=7)
        report = convert(model, "splitattention")
        assert report.rows[2].after == "SplitAttentionConv2d(64, 64, k=3x3), in the place of bn2 too"
        blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
        assert [type(block.bn2) for block in blocks] == [nn.Identity] * 16
        assert {type(block.bn1) for block in blocks} == {nn.BatchNorm2d}
        # ResNeSt's bottleneck: split attention, then the last 1x1 convolution.
        block, x = blocks[0].eval(), torch.randn(2, 64, 9, 8)
        y = block.bn3(block.conv3(block.conv2(torch.relu(block.bn1(block.conv1(x)))))) + block.downsample(x)
        assert_close(block(x), torch.relu(y))

    def test_split_attention_needs_a_norm_and_a_relu_behind_it(self) -> None:
        """It has both inside: residual branches of basic blocks and other activations would change their meaning."""
        reason = "no batch norm and ReLU behind it"
        with torch.device("meta"):
            report = convert(torchvision.models.resnet18(), "splitattention")
            assert report.replaced == [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
            assert report.left["layer1.0.conv2"] == reason
            for silu in ("efficientnetv2_rw_t", "cspresnet50"):
                model = timm.create_model(silu, pretrained=False)
                with pytest.raises(ValueError, match=reason):
                    convert(model, "splitattention")
            model = torchvision.models.resnet18()
            report = convert(model, "splitattention", include="layer1.0.conv2")
            assert report.replaced == ["layer1.0.conv2"]
            assert type(model.layer1[0].bn2) is nn.BatchNorm2d

    def test_conversion_leaves_no_traces_of_its_looking(self) -> None:
        class Counting(nn.Sequential):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                self.last = super().forward(x)
                return self.last

        model = Counting(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        assert convert(model, "splitattention").replaced == ["1.0"]
        assert (model.calls, hasattr(model, "last")) == (0, False)

    @pytest.mark.parametrize("change", [nn.utils.spectral_norm, lambda conv: conv.register_forward_hook(print)])
    def test_convolutions_with_hooks_are_left(self, change: Callable[[nn.Module], object]) -> None:
        model = small()
        change(model[2])
        report = convert(model, "doconv", upcycle=True)
        assert report.left == {"2": "has forward hooks (weight norm, pruning, or your own), which would be lost"}

    def test_the_first_convolution_is_the_network_s(self) -> None:
        model = small()
        convert(model, "doconv", include="0")
        assert convert(model, "dynamic").replaced == ["2", "4"]

    def test_dgconv_learns_the_groups_that_there_were(self) -> None:
        model = torchvision.models.resnext50_32x4d(num_classes=7)
        convert(model, "dgconv", gate_init="dense")
        assert model.layer1[0].conv2.weight.shape == (128, 128, 3, 3)
        assert model.layer1[0].conv2.membership().all()

    def test_padding_modes_are_left(self) -> None:
        model = small()
        model[2].padding_mode = "reflect"
        report = convert(model, "dynamic")
        assert report.left == {"0": FIRST, "2": "padding_mode='reflect'"}
        assert report.replaced == ["4"]


class TestSelection:
    @pytest.mark.parametrize(
        ("include", "exclude", "replaced"),
        [
            ("layer4.1.*", None, ["layer4.1.conv1", "layer4.1.conv2"]),
            (
                ["conv1", "layer?.0.downsample.*"],
                "layer3*",
                ["conv1", "layer2.0.downsample.0", "layer4.0.downsample.0"],
            ),
            (lambda name, conv: conv.kernel_size == (7, 7), None, ["conv1"]),
            (None, ["layer[123].*", "*.conv1"], ["layer4.0.conv2", "layer4.1.conv2"]),
            (
                None,
                lambda name, conv: conv.in_channels < 512,
                [f"layer4.{n}" for n in ("0.conv2", "1.conv1", "1.conv2")],
            ),
        ],
    )
    def test_include_and_exclude(self, include: Any, exclude: Any, replaced: list[str], resnet: nn.Module) -> None:
        assert convert(resnet, "dynamic", include=include, exclude=exclude).replaced == replaced

    def test_reasons(self, resnet: nn.Module) -> None:
        report = convert(resnet, "dynamic", include="layer4.*", exclude="layer4.0*")
        assert report.left["conv1"] == "not in include"
        assert report.left["layer4.0.conv1"] == "in exclude"
        assert len(report.left) + len(report.replaced) == 20

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    @pytest.mark.parametrize("selection", ["layer5.*", ["layer4.*", "layer5.*"]])
    def test_a_glob_that_matches_nothing(self, argument: str, selection: Any, resnet: nn.Module) -> None:
        message = rf"{argument}='layer5.\*' matches no convolution; there are conv1, layer1.0.conv1, .*layer4.1.conv2"
        with pytest.raises(ValueError, match=message):
            convert(resnet, "dynamic", **{argument: selection})

    @pytest.mark.parametrize("include", [[], lambda name, conv: False])
    def test_nothing_selected(self, include: Any) -> None:
        with pytest.raises(
            ValueError, match=r"no convolution would be replaced: \{'0': 'not in include', '2': .*'4': "
        ):
            convert(small(), "dynamic", include=include)

    @pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Conv2d(3, 4, 3)])
    def test_a_model_without_convolutions(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no nn.Conv2d to replace"):
            convert(model, "dynamic")


class TestConv:
    def test_unknown_name_lists_the_names_and_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"conv='dynamc' does not exist, did you mean 'dynamic'\?") as error:
            convert(small(), "dynamc")
        assert all(repr(name) in str(error.value) for name in CONVS)
        with pytest.raises(ValueError, match=r"conv='zzz' does not exist \(choose one of"):
            resolve_conv("zzz")

    @pytest.mark.parametrize(("conv", "options"), [(Own, {"own": 3}), (partial(Own, own=3), {})])
    def test_a_user_s_own_class(self, conv: Callable[..., nn.Module], options: dict[str, Any]) -> None:
        model = small()
        before = [repr(model[index]).replace("Conv2d", "Own") for index in (2, 4)]
        assert convert(model, conv, **options).replaced == ["2", "4"]
        assert [repr(model[index]) for index in (2, 4)] == before
        assert model[2].own == 3

    @pytest.mark.parametrize("conv", ["dynamic", "condconv"])
    def test_the_new_layers_have_the_old_shapes(self, conv: str) -> None:
        model, x = small(), torch.randn(2, 3, 15, 13)
        shape, inner = model(x).shape, model[:3](x).shape
        convert(model, conv)
        assert model(x).shape == shape
        assert model[:3](x).shape == inner

    @pytest.mark.parametrize("conv", ["dynamic", Own])
    @pytest.mark.parametrize("training", [True, False])
    def test_dtype_and_mode_are_kept(self, training: bool, conv: Any) -> None:
        model = small().double().train(training)
        convert(model, conv)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert {module.training for module in model.modules()} == {training}

    def test_a_convolution_of_two_names_stays_one(self) -> None:
        model = small()
        model.append(nn.Sequential(model[2]))
        assert convert(model, "dynamic").replaced == ["2", "4", "5.0"]
        assert model[2] is model[5][0]
        assert type(model[2]) is DynamicConv2d


class TestRefusal:
    @pytest.mark.parametrize(
        ("conv", "options", "message"),
        [
            ("dynamic", {"num_kernels": 0}, r"2 = Conv2d\(4, 6.*groups=2\): num_kernels=0 must be at least 1"),
            ("condconv", {"num_experts": 0}, "num_experts=0 must be at least 1"),
            ("dynamic", {"temperature": -1}, "temperature=-1 must be a finite number above 0"),
            ("dynamic", {"num_experts": 4}, "unexpected keyword argument 'num_experts'"),
        ],
    )
    @pytest.mark.parametrize("upcycle", [True, False])
    def test_leaves_the_network_untouched(
        self, conv: str, options: dict[str, Any], message: str, upcycle: bool
    ) -> None:
        model = small()
        before = list(model)
        with pytest.raises(ValueError, match=message):
            convert(model, conv, upcycle=upcycle, **options)
        assert all(layer is old for layer, old in zip(model, before, strict=True))

    def test_of_a_later_layer_leaves_the_earlier_untouched(self) -> None:
        model = small()
        before = list(model)
        with pytest.raises(ValueError, match=r"4 = Conv2d\(6, 5.*: mine"):
            convert(model, picky, include=["2", "4"])
        assert all(layer is old for layer, old in zip(model, before, strict=True))

    def test_by_the_rule_leaves_the_layer(self) -> None:
        report = convert(small(), picky)
        assert (report.replaced, report.left["4"]) == (["2"], "refused: mine")
        with torch.device("meta"):
            report = convert(timm.create_model("regnety_002", pretrained=False), "involution")
        assert "refused: group_channels=16 must divide in_channels=24: take fewer (or 1)" in report.left.values()
        assert report.replaced

    def test_upcycle_needs_from_conv(self) -> None:
        with pytest.raises(ValueError, match=r"upcycle=True needs Own\.from_conv, which does not exist"):
            convert(small(), Own, upcycle=True)


class TestUpcycle:
    @pytest.mark.parametrize(
        ("conv", "options"),
        [("dynamic", {"num_kernels": 2}), ("condconv", {"num_experts": 3}), ("dgconv", {}), ("doconv", {})],
    )
    @torch.no_grad()
    def test_keeps_the_logits(self, conv: str, options: dict[str, Any]) -> None:
        model, x = randomize_norms_(torchvision.models.resnet18(num_classes=7)).eval(), torch.randn(2, 3, 64, 48)
        logits = model(x)
        assert logits.std() > 0.1
        selection = {"exclude": "conv1"} if conv == "dgconv" else {}  # 3 and 64 channels have no common factor
        assert len(convert(model, conv, include="*", **selection, upcycle=True, **options).replaced) in (19, 20)
        assert_close(model(x) / logits.std(), logits / logits.std())

    def test_passes_options_on(self) -> None:
        model = small()
        convert(model, "dynamic", upcycle=True, num_kernels=2, temperature=5)
        assert len(model[2].weight) == 2
        assert model[2].router.temperature == 5

    @pytest.mark.parametrize("conv", [DynamicConv2d, "condconv"])
    def test_keeps_every_geometry(self, conv: Any) -> None:
        model, x = fill_with_noise_(small().double()), torch.randn(2, 3, 15, 13).double()
        fresh, before = copy.deepcopy(model), model(x)
        convert(model, conv, upcycle=True)
        assert_close(model(x), before)
        convert(fresh, conv)
        assert (fresh(x) - before).abs().max() > 0.1


class TestTwice:
    def test_two_kinds_of_layers(self, resnet: nn.Module) -> None:
        first = convert(resnet, "dynamic", include="layer3.*", exclude="*downsample*")
        before = types(resnet)
        second = convert(resnet, "condconv", include="layer4.*")
        after = types(resnet)
        assert {after[name] for name in first.replaced} == {DynamicConv2d}
        assert {after[name] for name in second.replaced} == {CondConv2d}
        assert (len(first.replaced), len(second.replaced)) == (4, 5)
        assert {name for name in before if name in after and before[name] != after[name]} == set(second.replaced)

    def test_never_goes_inside_a_layer_that_was_replaced(self) -> None:
        model = small()
        convert(model, Holding, include="2")
        report = convert(model, "dynamic", include="*")
        assert [row.name for row in report.rows] == ["0", "4"]
        assert type(model[2].inner) is nn.Conv2d

    def test_nothing_left(self) -> None:
        model = small()
        convert(model, "dynamic", include="*")
        with pytest.raises(ValueError, match=r"Sequential has no nn\.Conv2d to replace"):
            convert(model, "condconv")


class TestReport:
    def test_rows_and_text(self) -> None:
        model = small()
        report = convert(model, "condconv", exclude="4", num_experts=3)
        conv, layer = 6 * 2 * 9 + 6, 3 * (6 * 2 * 9 + 6) + (4 + 1) * 3
        assert [(row.name, row.before, row.after) for row in report.rows] == [
            ("0", "Conv2d(3, 4, k=3x3)", "Conv2d(3, 4, k=3x3)"),
            ("2", "Conv2d(4, 6, k=3x3, s=2, g=2)", "CondConv2d(4, 6, k=3x3, s=2, g=2)"),
            ("4", "Conv2d(6, 5, k=1x3, d=1x2)", "Conv2d(6, 5, k=1x3, d=1x2)"),
        ]
        assert [(row.parameters_before, row.parameters_after) for row in report.rows] == [
            (112, 112),
            (conv, layer),
            (90, 90),
        ]
        assert str(report).splitlines() == [
            "name  before                         after                              parameters",
            "0     Conv2d(3, 4, k=3x3)            left: the first convolution        112 -> 112",
            "2     Conv2d(4, 6, k=3x3, s=2, g=2)  CondConv2d(4, 6, k=3x3, s=2, g=2)  114 -> 357",
            "4     Conv2d(6, 5, k=1x3, d=1x2)     left: in exclude                   90 -> 90",
            "1 of 3 convolutions replaced; parameters in convolutions 316 -> 559",
        ]

    def test_methods_are_a_column_on_request(self) -> None:
        model = small()
        report = convert(model, "condconv", exclude="4", num_experts=3)
        report.methods = {"2": "grouped"}
        assert str(report).splitlines()[:3] == [
            "name  before                         after                              parameters  method",
            "0     Conv2d(3, 4, k=3x3)            left: the first convolution        112 -> 112",
            "2     Conv2d(4, 6, k=3x3, s=2, g=2)  CondConv2d(4, 6, k=3x3, s=2, g=2)  114 -> 357  grouped",
        ]

    def test_a_layer_of_unknown_shape_goes_by_its_class(self) -> None:
        report = convert(small(), Holding)
        assert report.rows[1].after == "Holding"
