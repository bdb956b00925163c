import pytest
import torchvision
from torch import nn

from dyn_lightning.layers import CondConv2d
from dyn_lightning.rules import find_convolutions, first_convolution
from tests.training import Mixed


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Sequential(conv()), conv()), "1.0"),
        (nn.Sequential(CondConv2d(4, 4, 1), conv()), ""),  # it was replaced
        (nn.Sequential(nn.ReLU(), Mixed(conv()), conv()), ""),
        (nn.Linear(3, 4), ""),
    ],
)
def test_first_convolution(model: nn.Module, name: str) -> None:
    assert first_convolution(model) == name


class TestFindConvolutions:
    def test_by_every_name(self) -> None:
        shared = conv()
        model = nn.Sequential(shared, nn.Sequential(conv(), shared))
        assert find_convolutions(model) == {"0": shared, "1.0": model[1][0], "1.1": shared}

    def test_not_inside_what_was_replaced(self) -> None:
        model = nn.Sequential(Mixed(conv()), nn.Sequential(conv()))
        assert list(find_convolutions(model)) == ["1.0"]

    def test_of_a_network(self) -> None:
        model = torchvision.models.resnet18()
        assert len(find_convolutions(model)) == 20
