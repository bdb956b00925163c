from typing import Any

import pytest
import torch
from torch import nn

from dyn_lightning.per_sample.methods import mix_kernels, output_size
from tests.contract import GEOMETRIES


def test_mix_kernels_of_one_open_kernel() -> None:
    weight = torch.randn(3, 6, 4, 3, 2)
    assert torch.equal(mix_kernels(torch.eye(3)[[2, 0]], weight), weight[[2, 0]])


@pytest.mark.parametrize(("stride", "padding", "dilation"), [g for g in GEOMETRIES if g[1] != "same"])
def test_output_size(stride: Any, padding: Any, dilation: Any) -> None:
    conv = nn.Conv2d(1, 1, (3, 2), stride, padding, dilation)
    expected = conv(torch.zeros(1, 1, 15, 8)).shape[2:]
    assert output_size((15, 8), (3, 2), conv.stride, conv.padding, conv.dilation) == expected
