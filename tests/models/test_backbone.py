import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dyn_lightning.models import MODELS, CifarResNet, build_backbone
from dyn_lightning.models.backbone import UnknownNameError, import_object
from tests.noise import randomize_norms_

HERE = __name__


class Own(nn.Module):
    """A user's own network, which takes both numbers and an option."""

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def own(in_channels: int, num_classes: int) -> nn.Module:
    return Own(in_channels, num_classes)


def fixed(hidden: int = 5) -> nn.Module:
    """Take neither number."""
    return Own(2, 6, hidden)


def no_module(num_classes: int) -> int:
    return num_classes


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("name", "options", "kind", "size"),
    [
        ("cifar_resnet", {"depth": 8, "width": 4}, CifarResNet, 32),
        ("resnet18", {}, torchvision.models.ResNet, 32),
        ("mobilenet_v2", {"width_mult": 0.25}, torchvision.models.MobileNetV2, 32),
        ("squeezenet1_1", {}, torchvision.models.SqueezeNet, 32),
        ("timm/resnet18", {"base_width": 64}, "timm.models.resnet", 32),
        ("resnet10t", {}, "timm.models.resnet", 32),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}, "timm.models.vision_transformer", 32),
        (f"{HERE}.Own", {"hidden": 7}, Own, 9),
        (f"{HERE}.own", {}, Own, 9),
    ],
)
def test_honours_classes_and_channels(name: str, options: dict[str, Any], kind: Any, size: int, channels: int) -> None:
    model = build_backbone(name, 7, channels, **options)
    assert type(model).__module__ == kind if isinstance(kind, str) else type(model) is kind
    assert model.eval()(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert model.training is False
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_options_reach_the_model() -> None:
    assert build_backbone("mobilenet_v2", 7, 3, width_mult=0.5).classifier[1].in_features == 1280
    assert build_backbone("mobilenet_v2", 7, 3, width_mult=0.5).features[0][0].out_channels == 16
    assert build_backbone("timm/resnet18", 7, 3, stem_type="deep", stem_width=32).conv1[0].out_channels == 32
    assert build_backbone(f"{HERE}.Own", 7, 3, hidden=9).fc.in_features == 9


def test_a_callable_may_take_neither_number() -> None:
    model = build_backbone(f"{HERE}.fixed", 7, 3, hidden=4)
    assert (model.conv.in_channels, model.fc.out_features) == (2, 6)


def test_models_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "own", Own)
    assert build_backbone("own", 7, 1).conv.in_channels == 1


@pytest.mark.parametrize("channels", [1, 6])
def test_a_new_stem_is_as_large_as_the_old_and_its_channels_differ(channels: int) -> None:
    stem, old = build_backbone("resnet18", 7, channels).conv1, torchvision.models.resnet18().conv1
    assert stem.in_channels == stem.weight.shape[1] == channels
    assert stem.weight.std().item() == pytest.approx(old.weight.std().item(), rel=0.1)
    assert channels == 1 or not torch.equal(stem.weight[:, 0], stem.weight[:, -1])


def test_the_stem_is_left_where_channels_agree() -> None:
    torch.manual_seed(1)
    expected = torchvision.models.resnet18(num_classes=7).conv1.weight
    torch.manual_seed(1)
    assert torch.equal(build_backbone("resnet18", 7, 3).conv1.weight, expected)


class TestPretrained:
    """No network: the file that torchvision would download is made here."""

    @pytest.fixture
    def state(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
        """Weights of the network that the test's class names, other than the ones it starts with."""
        name = getattr(request, "param", "resnet18")
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = randomize_norms_(torchvision.models.get_model(name)).state_dict()
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(state, folder / weights.url.rpartition("/")[2])
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        return state

    @pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
    @pytest.mark.parametrize("num_classes", [1000, 10])
    def test_weights_are_loaded(self, state: dict[str, Tensor], num_classes: int, weights: str) -> None:
        model = build_backbone("resnet18", num_classes, 3, weights=weights)
        loaded = model.state_dict()
        heads = {"fc.weight", "fc.bias"}
        assert [name for name in state if name not in heads and not torch.equal(loaded[name], state[name])] == []
        assert model.fc.out_features == num_classes
        if num_classes == 1000:
            assert torch.equal(model.fc.weight, state["fc.weight"])

    @pytest.mark.parametrize("channels", [1, 2, 4, 5])
    @pytest.mark.parametrize("state", ["resnet18", "mobilenet_v2"], indirect=True)
    def test_other_channels_keep_the_output_for_equal_channels(
        self, state: dict[str, Tensor], channels: int, request: pytest.FixtureRequest
    ) -> None:
        name = request.node.callspec.params["state"]
        colour = build_backbone(name, 1000, 3, weights="DEFAULT").double().eval()
        other = build_backbone(name, 1000, channels, weights="DEFAULT").double().eval()
        grey = torch.randn(2, 1, 33, 32, dtype=torch.float64)
        expected = colour(grey.expand(-1, 3, -1, -1))
        # The weights were divided in float32.
        torch.testing.assert_close(other(grey.expand(-1, channels, -1, -1)), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 1e-2

    @pytest.mark.parametrize("state", ["squeezenet1_1"], indirect=True)
    @pytest.mark.parametrize("num_classes", [1000, 10])
    def test_a_network_whose_head_is_a_convolution(self, state: dict[str, Tensor], num_classes: int) -> None:
        """SqueezeNet has no nn.Linear."""
        model = build_backbone("squeezenet1_1", num_classes, 3, weights="DEFAULT")
        assert torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, num_classes)

    def test_refuses_unknown_weights(self) -> None:
        with pytest.raises(ValueError, match=re.escape("backbone='resnet18' with {'weights': 'NEWEST'}: ")):
            build_backbone("resnet18", 10, 3, weights="NEWEST")


class TestRefuses:
    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("resnet81", "'resnet18'"),
            ("cifar_resnt", "'cifar_resnet'"),
            ("mobilenetv3_smal_100", "'mobilenetv3_small_100'"),  # timm's
            ("timm/resnet81", None),
        ],
    )
    def test_an_unknown_name(self, name: str, near: str | None) -> None:
        with pytest.raises(ValueError, match=re.escape(f"backbone={name!r} does not exist")) as error:
            build_backbone(name, 10, 3)
        text = str(error.value)
        assert all(known in text for known in ("cifar_resnet", "resnet18", "mobilenet_v2", "dotted paths"))
        assert near is None or f"did you mean {near}" in text

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("nowhere.Net", "there is no module 'nowhere'"),
            ("tests.nowhere.Net", "there is no module 'tests.nowhere'"),
            (f"{HERE}.Missing", f"the module {HERE!r} has no 'Missing'"),
        ],
    )
    def test_a_path_to_nothing(self, name: str, why: str) -> None:
        with pytest.raises(ValueError, match=re.escape(why)):
            build_backbone(name, 10, 3)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("cifar_resnet", {"nonsense": 1}),
            ("cifar_resnet", {"depth": 9}),
            ("resnet18", {"nonsense": 1}),
            ("timm/resnet18", {"nonsense": 1}),
            (f"{HERE}.Own", {"nonsense": 1}),
            (f"{HERE}.Own", {"hidden": -1}),
        ],
    )
    def test_options(self, name: str, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=re.escape(f"backbone={name!r} with {options}: ")):
            build_backbone(name, 10, 3, **options)

    def test_what_is_no_module(self) -> None:
        with pytest.raises(ValueError, match=re.escape("it gives a int, not a torch.nn.Module")):
            build_backbone(f"{HERE}.no_module", 10, 3)

    def test_what_cannot_be_called(self) -> None:
        with pytest.raises(ValueError, match=re.escape(f"backbone='{HERE}.HERE' with {{}}: ")):
            build_backbone(f"{HERE}.HERE", 10, 3)


class TestImportObject:
    @pytest.mark.parametrize("path", ["nowhere", "nowhere.it", f"{HERE}.it", "torch.nowhere.it", ""])
    def test_leads_to_nothing(self, path: str) -> None:
        with pytest.raises(UnknownNameError):
            import_object(path)

    def test_a_module_that_lacks_another_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lacking.py").write_text("import nowhere_to_be_found\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
            import_object("lacking.Net")


def test_timm_is_not_imported_for_others() -> None:
    code = """
import sys
from dyn_lightning.models import build_backbone
build_backbone("cifar_resnet", 10, 3)
build_backbone("resnet18", 10, 3)
print("timm" in sys.modules)
build_backbone("resnet10t", 10, 3)
print("timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
