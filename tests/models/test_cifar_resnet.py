import re

import pytest
import torch
from torch import nn

from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.models import CifarResNet


def by_hand(depth: int, width: int, num_classes: int, channels: int) -> int:
    """Count weights of convolutions without bias, two numbers a channel for each norm, and the last layer."""

    def stage(inputs: int, outputs: int) -> int:
        first = 9 * inputs * outputs + 9 * outputs**2 + 4 * outputs
        return first + ((depth - 2) // 6 - 1) * (2 * 9 * outputs**2 + 4 * outputs)

    stages = stage(width, width) + stage(width, 2 * width) + stage(2 * width, 4 * width)
    return 9 * channels * width + 2 * width + stages + (4 * width + 1) * num_classes


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
@pytest.mark.parametrize(("width", "num_classes", "channels"), [(16, 10, 3), (5, 7, 1), (8, 100, 4)])
def test_parameters_by_hand(depth: int, width: int, num_classes: int, channels: int) -> None:
    network = CifarResNet(depth, width, num_classes, channels)
    assert parameters(network) == by_hand(depth, width, num_classes, channels)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)], ids=lambda value: str(value)
)
def test_parameters_of_the_paper(depth: int, millions: float) -> None:
    """He et al., table 6."""
    assert parameters(CifarResNet(depth)) / 1e6 == pytest.approx(millions, abs=0.04 if depth == 110 else 0.005)


def test_parameters_and_multiply_adds_of_depth_20() -> None:
    """40.6 million: 32 x 32 x 9 x 3 x 16 for the stem, 9.4 million for each pair of equal layers, 640 at the end."""
    assert parameters(CifarResNet()) == 269_722
    stem, layer = 32 * 32 * 9 * 3 * 16, 32 * 32 * 9 * 16 * 16
    assert multiply_adds(CifarResNet(), (3, 32, 32)) == stem + (6 + 5.5 + 5.5) * layer + 640


@pytest.mark.parametrize("depth", [14, 20])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    layers = [module for module in CifarResNet(depth).modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 21, 52])
def test_refuses_a_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"depth={depth} must be 6 n + 2 with n >= 1: 8, 14, 20")):
        CifarResNet(depth)


@pytest.mark.parametrize("size", [(32, 32), (17, 33), (7, 6), (1, 1)], ids=str)
@pytest.mark.parametrize(("num_classes", "channels"), [(10, 3), (7, 1)])
def test_takes_any_size(size: tuple[int, int], num_classes: int, channels: int) -> None:
    network = CifarResNet(8, 4, num_classes, channels)
    assert network(torch.randn(2, channels, *size)).shape == (2, num_classes)


def test_stages_halve_the_resolution() -> None:
    network = CifarResNet(8, 4)
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda stage, args, output: shapes.append(tuple(output.shape)))
    network(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]


def test_a_block_without_weights_is_its_shortcut() -> None:
    """Every second pixel, and zeros in the new channels (option A)."""
    block = CifarResNet(8, 4).layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 7, 6)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 4, 3)], dim=1)
    torch.testing.assert_close(block(x), expected)
